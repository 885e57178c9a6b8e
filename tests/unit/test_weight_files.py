"""Weight files that somebody else wrote: refused where the safetensors library refuses them, and with a sentence."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file

from checkpoints import CorruptArtifactError, UserError, plain_folder, write_artifact
from checkpoints.hashing import describe_file
from checkpoints.safetensors import BITS, Header, header_bytes, read_header, read_spans
from checkpoints.tensors import read_weight_file
from modularforge.assembly.plan import output_tensors, plan_merge
from modularforge.assembly.stream import execute
from modularforge.errors import DataError
from modularforge.model.folder import read_tensors
from modularforge.model.text_router import load_text_router
from modularforge.routing.statistics import (
    STATISTICS_NAME,
    LayerStatistics,
    RouterStatistics,
    load_statistics,
    save_statistics,
)
from modularforge.routing.text_counts import TextCounts, load_counts, only_tokens, save_counts
from modularforge.routing.text_evidence import Texts, write_tables
from tests.fuzzing import time_limit
from tests.mutation import FUZZ_INPUTS, texts, values

# What the library takes and we do not.
STRICTER = ("is there twice", "is no object", "deeper than", "no JSON object", "unknown type {", "surrogate")
GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def good_files() -> list[bytes]:
    torch.manual_seed(0)
    several = {
        "layers.0.weight": torch.randn(3, 5), "layers.0.half": torch.randn(7).half(), "empty": torch.zeros(0, 4),
        "é": torch.arange(3), "flags": torch.tensor([True, False]), "scalar": torch.tensor(1.5).bfloat16(),
    }  # fmt: skip
    return [save({"a": torch.ones(1)}), save(several, metadata={"format": "pt"}), save({})]


def file_of(header: Any, data: bytes) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def hostile_files() -> Iterator[bytes]:
    """Broken bytes of whole files, and whole headers with hostile values, with as many bytes as before or as needed."""
    yield from texts(good_files())
    several = good_files()[1]
    (length,) = struct.unpack_from("<Q", several)
    header, data = json.loads(several[8 : 8 + length]), several[8 + length :]
    rng = random.Random(0)
    for value in values(header):
        yield file_of(value, data[: rng.choice([len(data), len(data), 0, 4])])


def ours(content: bytes) -> Header | str:
    try:
        return read_header(lambda start, end: content[start:end], len(content))
    except ValueError as error:
        return str(error)


def theirs(content: bytes) -> dict[str, dict[str, Any]] | str:
    try:
        return dict(deserialize(content))
    except SafetensorError as error:
        return str(error)


def test_nothing_that_the_library_refuses_is_accepted_and_no_good_file_refused() -> None:
    seen = {"both": 0, "neither": 0, "stricter": 0}
    for content in hostile_files():
        mine, library = ours(content), theirs(content)
        if isinstance(mine, Header):
            assert not isinstance(library, str), (library, content)
            start = mine.data_start
            assert {name: (list(entry.shape), content[start + entry.start : start + entry.end])
                    for name, entry in mine.tensors.items()} == {
                name: (value["shape"], bytes(value["data"])) for name, value in library.items()
            }  # fmt: skip
            seen["both"] += 1
        elif isinstance(library, str):
            assert len(mine) < 600
            seen["neither"] += 1
        else:
            assert any(reason in mine for reason in STRICTER), (mine, content)
            seen["stricter"] += 1
    assert seen["both"] > FUZZ_INPUTS // 20, seen
    assert seen["neither"] > FUZZ_INPUTS, seen


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_of_the_library_is_known_with_its_size(dtype: str) -> None:
    for count in (1, 2, 3, 4, 8):
        for size in range(0, 66):
            content = file_of({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, size]}}, bytes(size))
            assert isinstance(ours(content), Header) == (not isinstance(theirs(content), str))


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**GOOD, "data_offsets": [-4, 0]}},
        {"a": {**GOOD, "data_offsets": [0, 2**63]}},
        {"a": {**GOOD, "data_offsets": [4, 8]}},
        {"a": GOOD, "b": GOOD},
        {"a": GOOD, "b": {**GOOD, "data_offsets": [8, 12]}},
        {"a": {**GOOD, "shape": [-1, -1]}},
        {"a": {**GOOD, "shape": [1.0]}},
        {"a": {**GOOD, "shape": [True]}},
        {"a": {**GOOD, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        {"a": {**GOOD, "shape": ["1"]}},
        {"a": {**GOOD, "dtype": "F33"}},
        {"a": {**GOOD, "dtype": ["F32"]}},
        {"a": {**GOOD, "data_offsets": [0, 4, 4]}},
        {"a": None},
        {"a": GOOD, "__metadata__": {"format": 1}},
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\\ud83d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":' * 3000,
        b"[" * 200_000,
        b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"{} {}",
        b"[]",
        b"",
    ],
)
def test_a_bad_header_is_refused_by_store_and_assembler(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, bytes(4)))
    with pytest.raises(DataError, match=r"model\.safetensors must be a safetensors file, but is not: "):
        read_spans(str(path))
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors must be a whole weight file"):
        describe_file(path)


@pytest.mark.parametrize("size", [0, 7, 8, 50, -1, 1])
def test_a_file_that_is_too_short_or_too_long_is_refused(size: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "model.safetensors", good_files()[0]
    path.write_bytes((whole + b"\0")[: size if size not in (-1, 1) else len(whole) + size])
    with pytest.raises(DataError):
        read_spans(str(path))
    with pytest.raises(CorruptArtifactError):
        describe_file(path)


def test_a_header_of_many_tensors_is_read_fast() -> None:
    many = [(f"model.layers.{n}.block_sparse_moe.experts.3.w1.weight", "F32", (2, 1), 8) for n in range(100_000)]
    content = header_bytes(many, {"format": "pt"}) + bytes(8 * len(many))
    start = time.process_time()
    header = read_header(lambda first, end: content[first:end], len(content))
    assert time.process_time() - start < 4  # about 1 s
    assert len(header.tensors) == len(many)


def test_the_written_header_is_the_librarys() -> None:
    tensors = {'é\n"x': torch.ones(2, 3), "a": torch.ones(1)}
    entries = [(name, "F32", tuple(tensors[name].shape), tensors[name].numel() * 4) for name in sorted(tensors)]
    assert save(tensors, metadata={"format": "pt"}).startswith(header_bytes(entries, {"format": "pt"}))


def test_hostile_weight_files_in_artifacts_end_in_a_sentence(tmp_path: Path) -> None:
    """Read by the store, by the assembler and, whole, by a merge: hashes are right, so only the content is bad."""
    refused = 0
    for number, content in enumerate(hostile_files()):
        if number % 8:
            continue
        url = str(tmp_path / str(number))
        try:
            with write_artifact(url, "expert", "f") as writer:
                (writer.folder / "state.safetensors").write_bytes(content)
                artifact = writer.commit()
            read_weight_file(artifact, "state.safetensors")
            spans = read_spans(artifact.file_url("state.safetensors"), artifact.manifest.files[
                "state.safetensors"].tensors)  # fmt: skip
            target = plain_folder(tmp_path / f"{number}-merged")
            target.folder.mkdir()
            execute(plan_merge(output_tensors(spans), 10**9), target)
            assert not isinstance(theirs(content), str)
        except UserError:
            refused += 1
    assert refused > 100


def test_a_weight_file_that_the_manifest_names_by_lie_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """The manifest of an attacker has the right hashes of a bad file."""
    for number, content in enumerate(hostile_files()):
        if number % 8 or not isinstance(theirs(content), str):
            continue
        url = str(tmp_path / str(number))
        with write_artifact(url, "expert", "f") as writer:
            writer.write_chunks("state.bin", [content])
            artifact = writer.commit()
        with pytest.raises(CorruptArtifactError, match=r"state\.bin must be a weight file, but is not"):
            read_weight_file(artifact, "state.bin")


def statistics_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    layers = [LayerStatistics(5.0, rng.random(4), rng.random((4, 4))) for _ in range(2)]
    save_statistics(folder / STATISTICS_NAME, RouterStatistics(layers, rng.random(7), rng.random(2)))
    return folder / STATISTICS_NAME


def test_hostile_statistics_end_in_a_sentence(tmp_path: Path) -> None:
    path = statistics_file(tmp_path)
    whole = path.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    scalars = json.loads(header["__metadata__"]["scalars"])
    contents = [*texts([whole]), *(file_of(value, data) for value in values(header))]
    for value in values(scalars):
        contents.append(file_of({**header, "__metadata__": {"scalars": json.dumps(value)}}, data))
    for content in contents:
        path.write_bytes(content)
        try:
            found = load_statistics(path)
            assert [layer.outer_DD.shape[0] for layer in found.layers] == [len(layer.sum_D) for layer in found.layers]
        except DataError:
            continue


@pytest.mark.parametrize("name", ["counts", "tables"])
def test_hostile_counts_and_tables_of_a_text_router_end_in_a_sentence(name: str, tmp_path: Path) -> None:
    path, counts = tmp_path / name, only_tokens(np.arange(9.0))
    pairs = TextCounts(counts.tokens_V, np.array([10, 20, 30]), np.ones(3, np.float32))
    if name == "counts":
        save_counts(path, pairs)
    else:
        write_tables(path, Texts([pairs, pairs], None, (0,), (0,)), public=True, most_pairs=9)
    whole = path.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    ((key, text),) = header["__metadata__"].items()
    contents = [*texts([whole]), *(file_of(value, data) for value in values(header))]
    for value in values(json.loads(text)):
        contents.append(file_of({**header, "__metadata__": {key: json.dumps(value)}}, data))
    read = 0
    for content in contents:
        path.write_bytes(content)
        with time_limit(content):
            try:
                if name == "counts":
                    assert load_counts(path).tokens_V.shape == (9,)
                else:
                    logits_BTR, _ = load_text_router(path)(torch.tensor([[1, 2, 3, 0, 4]]))
                    assert bool(logits_BTR.isfinite().all())
                read += 1
            except DataError:
                continue
    assert 0 < read < len(contents)


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": "../other.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": "x\\n/../y"}}', b'{"weight_map": {"a": "shard.safetensors"}}', b"[" * 200_000,
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it(index: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(DataError, match=r"must be an index of weight files|must hold shard\.safetensors"):
        read_tensors(tmp_path / "model")


def test_hostile_indices_end_in_a_sentence(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    good = {"metadata": {"total_size": 4}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    for content in [*texts([json.dumps(good).encode()]), *(json.dumps(value).encode() for value in values(good))]:
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        try:
            assert read_tensors(tmp_path).keys() == {"a"}
        except DataError:
            continue
