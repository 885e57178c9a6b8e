"""A file that is copied comes in parts into a few buffers, which are filled again, and each byte of it is compared."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import Artifact, CorruptArtifactError, StoreError, open_artifact, paths, retry, streams, write_artifact
from checkpoints.copying import copy_artifact
from checkpoints.folder import DurableFile
from tests.storage.proxy import Fault, FaultProxy, Request

PART = 2 << 20
FIRST = 1 << 20
NAME = "x.safetensors"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of 24 MB has more parts than there are buffers, and the small ones of a large file's beginning."""
    monkeypatch.setattr(streams, "PART_BYTES", PART)
    monkeypatch.setattr(streams, "FIRST_PART_BYTES", FIRST)


def weights(url: str, folder: Path) -> Artifact:
    tensors = {str(i): torch.randn(1_500_000, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    with write_artifact(url, "expert", "f") as writer:
        save_file(tensors, folder / NAME)
        writer.write_chunks(NAME, [(folder / NAME).read_bytes()])
        writer.write_chunks("empty.bin", [])
        return writer.commit()


def test_a_pulled_weight_file_is_the_same_and_a_few_buffers_serve_for_it(s3: str, tmp_path: Path) -> None:
    artifact = weights(s3, tmp_path)
    assert copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    assert (tmp_path / "copy" / "empty.bin").read_bytes() == b""
    open_artifact(str(tmp_path / "copy")).verify()
    entry, sizes, buffers = artifact.manifest.files[NAME], [], set()
    for part in streams.passing_file(artifact.file_url(NAME), entry):
        sizes.append(len(part))
        buffers.add(id(part.obj))
    assert len(buffers) <= streams.READS_IN_FLIGHT < len(sizes)
    assert sum(sizes) == entry.size
    assert sizes[: streams.READS_IN_FLIGHT + 1] == [FIRST] * streams.READS_IN_FLIGHT + [PART]


def test_a_part_that_was_cut_off_is_filled_from_its_beginning(proxy: FaultProxy, proxied: str, tmp_path: Path) -> None:
    artifact = weights(proxied, tmp_path)
    counted = itertools.count()

    def cut(request: Request) -> Fault | None:
        is_third = "Range" in request.headers and request.method == "GET" and next(counted) == 2
        return Fault("cut_answer") if is_third else None

    proxy.reset(cut)
    assert copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)
    assert next(counted) > 3
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()


@pytest.mark.parametrize("where", [3 << 20, 13 << 20, -1])
def test_a_flipped_bit_in_any_part_is_told_with_its_tensor(place: str, tmp_path: Path, where: int) -> None:
    artifact = weights(place, tmp_path)
    content = bytearray((tmp_path / NAME).read_bytes())
    content[where] ^= 1
    paths.replace_bytes(artifact.file_url(NAME), bytes(content))
    with pytest.raises(CorruptArtifactError, match=r"damaged: tensor \d, 1 of 4"):
        copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)
    assert not (tmp_path / "copy").exists()


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    artifact = weights(str(tmp_path / "made"), tmp_path)
    file = tmp_path / "made" / NAME
    entry = artifact.manifest.files[NAME]
    parts = streams.passing_file(str(file), entry)
    next(parts)
    os.truncate(file, 5 << 20)
    with pytest.raises(CorruptArtifactError, match="must have sha256"):
        list(parts)


@pytest.fixture
def one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second write of a process to a folder fails once, as one to a network file system may."""
    counted, write = itertools.count(), DurableFile.write

    def write_or_fail(file: DurableFile, chunk: bytes | memoryview) -> None:
        if next(counted) == 1:
            raise TimeoutError("timed out")
        write(file, chunk)

    monkeypatch.setattr(DurableFile, "write", write_or_fail)
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.0)


def test_a_cached_file_is_fetched_anew_when_a_write_failed(
    s3: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    artifact = weights(s3, tmp_path)
    request.getfixturevalue("one_timeout")
    assert artifact.local_file(NAME).read_bytes() == (tmp_path / NAME).read_bytes()


def test_parts_that_pass_once_are_not_written_without_those_that_passed(tmp_path: Path, one_timeout: None) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        paths.upload(str(tmp_path / "file"), iter([b"first", b"second", b"third"]))
    assert list(tmp_path.iterdir()) == []
