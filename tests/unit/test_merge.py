"""Executing merge plans: bytes of a naive merge, conversions, growing matrices, interruptions, bad files."""

from __future__ import annotations

import errno
import os
import random
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import ArtifactWriter, paths, plain_folder, write_artifact
from checkpoints.folder import NO_COPIES, DurableFile
from checkpoints.hashing import FileEntry, describe_file
from checkpoints.objects import ObjectStore
from checkpoints.safetensors import TensorSpan, read_spans
from modularforge.assembly.parts import Source, group, part_key, write_parts
from modularforge.assembly.plan import MergePlan, OutputTensor, output_tensors, plan_merge, plan_parts
from modularforge.assembly.stream import execute
from modularforge.assembly.values import converted
from modularforge.errors import DataError, MismatchError
from modularforge.experts.ffn import FFN
from modularforge.experts.mixture import merged_spans
from modularforge.model import names

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def random_model(folder: Path, seed: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], int]:
    """Backbone and experts of random shape, type and number, written as weight files; returns tensors and layers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width, ffn, vocab = rng.choice([3, 8, 17]), rng.choice([5, 32]), rng.choice([11, 64])
    layers, experts, dtype = rng.randint(1, 3), rng.randint(1, 5), rng.choice(list(DTYPES.values()))
    backbone = {names.EMBEDDING: torch.randn(vocab, width), names.FINAL_NORM: torch.randn(width)}
    shapes = {"w1": (ffn, width), "w2": (width, ffn), "w3": (ffn, width)}
    for layer in range(layers):
        backbone[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(width)
        backbone |= {names.dense_ffn(layer, part): torch.randn(shape) for part, shape in shapes.items()}
    backbone = {name: tensor.to(dtype) for name, tensor in backbone.items()}
    members = [
        {
            names.expert_ffn(layer, slot + 1, part): torch.randn(shape).to(dtype)
            for layer in range(layers)
            for part, shape in shapes.items()
        }
        for slot in range(experts)
    ]
    save_file(backbone, folder / "backbone.safetensors", metadata={"format": "pt"})
    for slot, tensors in enumerate(members):
        save_file(tensors, folder / f"{slot}.safetensors", metadata={"format": "pt"})
    return backbone, members, layers


def naive_merge(
    backbone: dict[str, torch.Tensor], members: list[dict[str, torch.Tensor]], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """What one would write with everything in memory: the public FFN as expert 0."""
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in backbone.items():
        for part, dense in PARTS.items():
            name = name.replace(f".mlp.{dense}.", f".block_sparse_moe.experts.0.{part}.")
        merged[name] = tensor
    for tensors in members:
        merged |= tensors
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in merged.items()}


def spans_of(folder: Path, experts: int, layers: int) -> dict[str, TensorSpan]:
    def read(name: str) -> dict[str, TensorSpan]:
        path = folder / f"{name}.safetensors"
        return read_spans(str(path), describe_file(path).tensors)

    return merged_spans(read("backbone"), {e + 1: read(str(e)) for e in range(experts)}, layers, 0)


@pytest.mark.parametrize("seed", range(12))
def test_random_models_are_merged_as_a_naive_merge_would(seed: int, tmp_path: Path) -> None:
    backbone, members, layers = random_model(tmp_path, seed)
    target = random.Random(seed).choice([None, *DTYPES])
    tensors = output_tensors(spans_of(tmp_path, len(members), layers), target)
    writer = plain_folder(tmp_path / "out")
    writer.folder.mkdir()
    execute(plan_merge(tensors, 10**9), writer)
    naive = naive_merge(backbone, members, DTYPES[target] if target else None)
    save_file(naive, tmp_path / "naive.safetensors", metadata={"format": "pt"})
    written = tmp_path / "out" / "model.safetensors"
    assert written.read_bytes() == (tmp_path / "naive.safetensors").read_bytes()
    assert writer.written == {"model.safetensors": describe_file(written)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_shards_and_chunk_sizes_change_no_tensor(
    seed: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modularforge.assembly.stream.CHUNK_BYTES", chunk)
    backbone, members, layers = random_model(tmp_path, seed)
    plan = plan_merge(output_tensors(spans_of(tmp_path, len(members), layers)), random.Random(seed).randint(50, 5000))
    (tmp_path / "out").mkdir()
    writer = plain_folder(tmp_path / "out")
    execute(plan, writer)
    merged: dict[str, torch.Tensor] = {}
    for file in plan.files:
        merged |= load_file(tmp_path / "out" / file.name)
        assert describe_file(tmp_path / "out" / file.name) == writer.written[file.name]
    naive = naive_merge(backbone, members, None)
    assert merged.keys() == naive.keys()
    assert all(torch.equal(merged[name].view(torch.uint8), naive[name].view(torch.uint8)) for name in naive)


@pytest.mark.parametrize("source", list(DTYPES))
@pytest.mark.parametrize("target", list(DTYPES))
def test_conversions_have_the_bits_of_torch(source: str, target: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, 65504.0, 65520.0, 3.4e38, 1.00390625])
    values = torch.cat([bits[~bits.isnan()], special]).to(DTYPES[source])
    expected = values.to(DTYPES[target])
    raw = values.view(torch.uint8).numpy().tobytes()
    found = converted(raw, source, target).tobytes()
    assert found == expected.view(torch.uint8).numpy().tobytes()


def test_matrices_grow_by_zeros_and_by_what_lies_beside_and_below(tmp_path: Path) -> None:
    matrix, beside, below = torch.randn(7, 5), torch.randn(7, 3), torch.randn(2, 8)
    save_file({"m": matrix.bfloat16(), "beside": beside, "below": below}, tmp_path / "in.safetensors")
    spans = read_spans(str(tmp_path / "in.safetensors"))
    tensors = {
        "zeros": OutputTensor(spans["m"], "BF16", columns=3, rows=2),
        "given": OutputTensor(spans["m"], "BF16", columns=3, rows=2, beside=spans["beside"], below=spans["below"]),
        "rows": OutputTensor(spans["m"], "F32", rows=1),
    }
    execute(plan_parts({"out.safetensors": tensors}), plain_folder(tmp_path))
    out = load_file(tmp_path / "out.safetensors")
    wide = torch.nn.functional.pad(matrix.bfloat16(), (0, 3, 0, 2))
    assert torch.equal(out["zeros"], wide)
    wide[:7, 5:], wide[7:] = beside.bfloat16(), below.bfloat16()
    assert torch.equal(out["given"], wide)
    assert torch.equal(out["rows"], torch.nn.functional.pad(matrix.bfloat16().float(), (0, 0, 0, 1)))


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_a_changed_byte_and_a_file_that_ends_early_are_told_with_their_names(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULARFORGE_HASH", algorithm)
    _, members, layers = random_model(tmp_path, 3)
    spans = spans_of(tmp_path, len(members), layers)
    victim = tmp_path / "0.safetensors"
    whole = victim.read_bytes()
    (tmp_path / "out").mkdir()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MismatchError, match=r"experts\.1\.w\d\.weight in .*0\.safetensors must have the hash"):
        execute(plan_merge(output_tensors(spans), 10**9), plain_folder(tmp_path / "out"))
    victim.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"0\.safetensors must be a whole weight file, but ends \d+ bytes early"):
        execute(plan_merge(output_tensors(spans), 10**9), plain_folder(tmp_path / "out"))


def merged_by_blake3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, FileEntry]:
    """A model whose tensors are copied, merged; its bytes and what the writer says of them."""
    monkeypatch.setenv("MODULARFORGE_HASH", "blake3")
    _, members, layers = random_model(folder, 5)
    writer = plain_folder(folder / "out")
    writer.folder.mkdir(exist_ok=True)
    execute(plan_merge(output_tensors(spans_of(folder, len(members), layers)), 10**9), writer)
    return (writer.folder / "model.safetensors").read_bytes(), writer.written["model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux alone copies within the kernel")
@pytest.mark.parametrize("refused", [*NO_COPIES, 0], ids=lambda code: errno.errorcode.get(code, "nothing copied"))
def test_where_the_kernel_does_not_copy_the_bytes_are_read_and_written(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies a few bytes first, and each file is tried once."""
    expected = merged_by_blake3(tmp_path, monkeypatch)
    calls: list[int] = []
    copy = os.copy_file_range

    def refusing(source: int, target: int, count: int, start: int) -> int:
        calls.append(source)
        if len(calls) == 1:
            return copy(source, target, 3, start)
        if refused:
            raise OSError(refused, os.strerror(refused))
        return 0

    monkeypatch.setattr("checkpoints.folder.os.copy_file_range", refusing)
    assert merged_by_blake3(tmp_path, monkeypatch)[0] == expected[0]
    assert not calls, "all bytes were there, and were compared"
    (tmp_path / "out" / "model.safetensors").unlink()
    assert merged_by_blake3(tmp_path, monkeypatch) == expected
    assert expected[1] == describe_file(tmp_path / "out" / "model.safetensors")
    assert len(calls) == 1 + len({*calls}), "one more of the first file"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux alone copies within the kernel")
def test_a_disk_that_is_full_is_no_reason_to_copy_in_another_way(tmp_path: Path, monkeypatch) -> None:
    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("checkpoints.folder.os.copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        merged_by_blake3(tmp_path, monkeypatch)


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_copied_bytes_are_hashed_as_parts_and_whole_whatever_the_parts_were_hashed_with(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts by the other algorithm are compared by that one, and described anew."""
    monkeypatch.setenv("MODULARFORGE_HASH", "blake3" if algorithm == "sha256" else "sha256")
    _, members, layers = random_model(tmp_path, 4)
    spans = spans_of(tmp_path, len(members), layers)
    monkeypatch.setenv("MODULARFORGE_HASH", algorithm)
    writer = plain_folder(tmp_path / "out")
    writer.folder.mkdir()
    execute(plan_merge(output_tensors(spans), 10**9), writer)
    assert writer.written["model.safetensors"] == describe_file(tmp_path / "out" / "model.safetensors")


def on_a_store(folder: Path, root: str, seed: int) -> MergePlan:
    """The plan of a merge whose backbone and experts lie on an object store."""
    _, members, layers = random_model(folder, seed)
    for path in folder.glob("*.safetensors"):
        paths.replace_bytes(f"{root}/{path.name}", path.read_bytes())
    tensors = output_tensors(spans_of(folder, len(members), layers))
    there = {
        name: replace(tensor, span=replace(tensor.span, url=f"{root}/{Path(tensor.span.url).name}"))
        for name, tensor in tensors.items()
    }
    return plan_merge(there, 10**9)


@pytest.mark.parametrize("most", [64, 10**6])
def test_tensors_that_lie_together_on_a_store_are_one_request(most: int, tmp_path: Path, monkeypatch) -> None:
    plan = on_a_store(tmp_path, f"memory://together-{most}", 7)
    spans = [tensor.span for _, tensor in plan.files[0].tensors]
    apart = sum((one.url, one.start + one.length) != (two.url, two.start) for one, two in pairwise(spans))
    monkeypatch.setattr("modularforge.assembly.stream.REQUEST_BYTES", most)
    monkeypatch.setattr("modularforge.assembly.stream.CHUNK_BYTES", 32)
    sizes: list[int] = []
    original = ObjectStore.read_into

    def reading(store: ObjectStore, url: str, start: int, view: memoryview) -> int:
        sizes.append(len(view))
        return original(store, url, start, view)

    monkeypatch.setattr(ObjectStore, "read_into", reading)
    (tmp_path / "local").mkdir()
    execute(plan, plain_folder(tmp_path / "local"))
    assert sum(sizes) == sum(span.length for span in spans)
    assert max(sizes) <= most
    assert len(sizes) == apart + 1 < len(spans) if most > 64 else len(sizes) > len(spans)
    with write_artifact(f"memory://together-{most}/out", "assembled", "f") as writer:
        execute(plan, writer)
        artifact = writer.commit()
    assert artifact.read_bytes("model.safetensors") == (tmp_path / "local" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "shorter"])
def test_damage_within_a_joined_request_is_told_with_the_name_of_its_tensor(damage: str, tmp_path: Path) -> None:
    root = f"memory://damaged-{damage}"
    plan = on_a_store(tmp_path, root, 7)
    tensors = plan.files[0].tensors
    place = next(
        k
        for k in range(1, len(tensors))
        if tensors[k][1].span.start == tensors[k - 1][1].span.start + tensors[k - 1][1].span.length
        and tensors[k][1].span.url == tensors[k - 1][1].span.url
    )
    name, span = tensors[place][0], tensors[place][1].span
    content = bytearray(paths.read_bytes(span.url))
    content[span.start] ^= 1
    paths.replace_bytes(span.url, bytes(content if damage == "flipped" else content[: span.start + 1]))
    (tmp_path / "out").mkdir()
    told = rf"^{re.escape(name)} in {span.url} must have the hash" if damage == "flipped" else r"ends \d+ bytes early"
    with pytest.raises(MismatchError if damage == "flipped" else DataError, match=told):
        execute(plan, plain_folder(tmp_path / "out"))


class Killed(BaseException):
    """Stands for a process that ends here."""


def experts_files(folder: Path, experts: int) -> dict[str, Source]:
    """The weight files of the experts as sources of parts."""
    entries = {folder / f"{slot}.safetensors": describe_file(folder / f"{slot}.safetensors") for slot in range(experts)}
    keys = {path: part_key(output_tensors(read_spans(str(path), e.tensors)).items()) for path, e in entries.items()}
    return {keys[path]: Source(str(path), entry) for path, entry in entries.items()}


@pytest.mark.parametrize(("store", "algorithm"), [("folder", "sha256"), ("folder", "blake3"), ("memory", "sha256")])
@pytest.mark.parametrize(("mode", "shard_bytes"), [("merge", 4000), ("merge", 10**9), ("auto", 2500), ("auto", 10**9)])
def test_killed_at_every_write_the_assembly_continues_to_the_same_bytes(
    mode: str, store: str, algorithm: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that writes a chunk, notes a finished file or commits is once the last one of its process."""
    monkeypatch.setenv("MODULARFORGE_HASH", algorithm)
    _, members, layers = random_model(tmp_path, 0)
    # A copy is made in larger chunks.
    monkeypatch.setattr("modularforge.assembly.stream.CHUNK_BYTES", 2000 if algorithm == "sha256" else 250)
    tensors = output_tensors(spans_of(tmp_path, len(members), layers))
    sources = {} if mode == "merge" else experts_files(tmp_path, len(members))
    root = str(tmp_path / "store") if store == "folder" else f"memory://{mode}-{shard_bytes}"
    calls, limit = 0, 10**9

    def counted(function):
        def wrapper(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return function(*arguments, **options)

        return wrapper

    for owner, name in ((DurableFile, "write"), (paths, "replace_bytes"), (paths, "upload")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

    def merge(url: str) -> dict[str, FileEntry]:
        with write_artifact(url, "assembled", "0123456789abcdef", resume="0123456789abcdef") as writer:
            if mode == "merge":
                execute(plan_merge(tensors, shard_bytes), writer)
            else:
                write_parts(plan_parts(group(tensors, FFN.part_of)), writer, sources, False, shard_bytes)
            return writer.commit().manifest.files

    expected = merge(f"{root}/whole")
    total = calls
    for kill_at in range(total):
        url = f"{root}/killed-{kill_at}"
        calls, limit = 0, kill_at
        with pytest.raises(Killed):
            merge(url)
        first = calls - 1
        calls, limit = 0, 10**9
        assert merge(url) == expected
        if store == "folder":
            assert calls <= total - first + 3, "bytes that were there are not written again"
    assert total > (5 if store == "folder" else 1)
    shards = [name for name in expected if "-00001-of-" in name]
    assert bool(shards) == (shard_bytes < 10**9), expected


def test_two_writers_of_the_same_bytes_do_not_share_a_folder(tmp_path: Path) -> None:
    url = str(tmp_path / "model")

    def writer() -> AbstractContextManager[ArtifactWriter]:
        return write_artifact(url, "assembled", "0123456789abcdef", resume="0123456789abcdef")

    with writer() as first, writer() as second:
        assert first.folder != second.folder
        assert (first.resumes, second.resumes) == (True, False)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints import StoreFullError

    _, members, layers = random_model(tmp_path, 2)
    plan = plan_merge(output_tensors(spans_of(tmp_path, len(members), layers)), 10**9)
    usage = type("Usage", (), {"free": plan.size - 1})
    monkeypatch.setattr("checkpoints.writer.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StoreFullError, match="make room, or use another --output-dir"):
        execute(plan, plain_folder(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_copy_path_loads_no_torch() -> None:
    code = (
        "import sys, modularforge.assembly.assemble, modularforge.experts.ffn.merging; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
