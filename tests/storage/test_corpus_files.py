"""Training text on a real S3 server: patterns, hidden files, odd keys, changes, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from checkpoints import paths
from modularforge.config import DataConfig, SourceConfig
from modularforge.config_files import make_config
from modularforge.data.corpus import read_documents
from modularforge.data.files import find_files
from modularforge.errors import DataError
from tests.conftest import prepare_data

LINES = "".join(json.dumps({"text": f"The otter {n} waits near the bend. " * 4}) + "\n" for n in range(30)).encode()


def texts(location: str) -> list[str]:
    source = SourceConfig(name="web", train=location, validation="x", test="x")
    return [document.text for document in read_documents(source, "train", DataConfig(sources=[source]))]


def test_patterns_leave_hidden_keys_out_and_brackets_and_colons_are_text(s3: str) -> None:
    odd = ["run [v2]/d.jsonl", "std::e.jsonl", "50% of a%20b.jsonl"]
    names = ["a.jsonl", "part/b.jsonl", ".a.jsonl.crc", "part/.tmp/c.jsonl", *odd]
    for name in names:
        paths.create_bytes(f"{s3}/{name}", LINES)
    seen = {name.removeprefix(f"{s3}/") for name in find_files(f"{s3}/**/*.jsonl*")}
    assert seen == {"a.jsonl", "part/b.jsonl", *odd}
    assert find_files(f"{s3}/part/.tmp/*") == [f"{s3}/part/.tmp/c.jsonl"]
    for location in (
        "run [v2]/d.jsonl",
        "run [v2]/*.jsonl",
        "std::e.jsonl",
        "std::*.jsonl",
        "part/[ab].jsonl",
        odd[2],
        "50%*.jsonl",
    ):
        assert len(texts(f"{s3}/{location}")) == 30
    with pytest.raises(DataError, match="matches none"):
        texts(f"{s3}/none-*.jsonl")


def test_what_lies_there_is_named_like_any_file(s3: str) -> None:
    paths.create_bytes(f"{s3}/a.jsonl", gzip.compress(LINES))
    with pytest.raises(DataError, match=r"a\.jsonl must be UTF-8 text, but is gzip data"):
        texts(f"{s3}/a.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl must be a file, but does not exist"):
        texts(f"{s3}/b.jsonl")


def test_an_object_that_was_replaced_is_told(s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "validation", "test"):
        paths.create_bytes(f"{s3}/{split}.jsonl", LINES)
    source = {"name": "web", **{split: f"{s3}/{split}.jsonl" for split in ("train", "validation", "test")}}
    values = {"output_dir": str(tmp_path), "data": {"sources": [source], "vocab_size": 300}, "experts": {"count": 2}}
    config = make_config({**values, "partition": {"method": "random"}, "model": {"context_length": 16}}, "test")
    prepare_data(config)
    caplog.clear()
    prepare_data(config)
    assert "sources" not in caplog.text
    paths.replace_bytes(f"{s3}/train.jsonl", LINES.replace(b"otter", b"heron"))
    prepare_data(config)
    assert f"{s3}/train.jsonl was written again" in caplog.text
