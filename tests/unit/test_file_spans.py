"""Parts of a large file, by bytes, hold together what the file holds, and say where a mistake is as the whole does."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modularforge.config import SourceConfig
from modularforge.data.formats import is_divisible, read_file
from modularforge.errors import DataError


def source_of(path: Path) -> SourceConfig:
    return SourceConfig(name="own", train=str(path))


def in_parts(path: Path, size: int) -> list[str]:
    end, source = path.stat().st_size, source_of(path)
    spans = [(start, min(start + size, end)) for start in range(0, end, size)]
    return [text for span in spans for text, _ in read_file(str(path), source, span)]


@pytest.mark.parametrize("size", [5, 64, 1000, 1 << 18])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_every_line_is_in_the_part_in_which_it_begins(tmp_path: Path, size: int, end: str) -> None:
    path, texts = tmp_path / "a.jsonl", [f"île {number} " * (number % 5 + 1) for number in range(20)]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end)
    assert in_parts(path, size) == texts


def test_a_line_longer_than_several_parts_and_chunks_is_whole(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.jsonl", ["a", "long " * 100_000, "b"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert in_parts(path, 50_000) == texts


@pytest.mark.parametrize(("bad", "said"), [(b"{nothing", "must be one JSON object"), (b'{"text": "\xff"}', "line 31")])
def test_a_mistake_in_a_part_has_the_line_of_the_file(tmp_path: Path, bad: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}).encode() for number in range(60)]
    path.write_bytes(b"\n".join([*lines[:30], bad, *lines[31:]]))
    for whole in (True, False):
        with pytest.raises(DataError, match=said) as found:
            list(read_file(str(path), source_of(path))) if whole else in_parts(path, 200)
        assert "a.jsonl:31 " in str(found.value) or "line 31" in str(found.value)


def test_rows_of_parquet_are_in_the_part_in_which_their_group_begins(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [f"row {number}" for number in range(100)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=9)
    for size in (150, 333, 1 << 20):
        assert in_parts(path, size) == texts


def test_what_is_compressed_or_has_no_lines_is_read_whole(tmp_path: Path) -> None:
    names = ["a.jsonl", "a.parquet", "a.jsonl.gz", "a.txt", "a.npy"]
    found = [is_divisible(str(tmp_path / name), source_of(tmp_path / name)) for name in names]
    assert found == [True, True, False, False, False]
    assert not is_divisible("https://host/a.jsonl", source_of(tmp_path))
