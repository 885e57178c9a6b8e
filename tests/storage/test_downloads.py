"""A file that is copied comes in parts, written side by side where they belong, and each byte of it is compared."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import (
    Artifact,
    CorruptArtifactError,
    StoreError,
    StoreFullError,
    fetching,
    open_artifact,
    paths,
    retry,
    streams,
    write_artifact,
)
from checkpoints.copying import copy_artifact
from checkpoints.folder import DurableFile
from checkpoints.pace import Pace
from tests.storage.proxy import Fault, FaultProxy, Request

PART = 2 << 20
NAME = "x.safetensors"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of 24 MB has more parts than there are buffers or requests."""
    monkeypatch.setattr(streams, "PART_BYTES", PART)
    monkeypatch.setattr(fetching, "LEAST_PART_BYTES", 1 << 20)


def weights(url: str, folder: Path) -> Artifact:
    tensors = {str(i): torch.randn(1_500_000, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    with write_artifact(url, "expert", "f") as writer:
        save_file(tensors, folder / NAME)
        writer.write_chunks(NAME, [(folder / NAME).read_bytes()])
        writer.write_chunks("empty.bin", [])
        return writer.commit()


def test_a_pulled_weight_file_is_the_same(s3: str, tmp_path: Path) -> None:
    artifact = weights(s3, tmp_path)
    told: list[int] = []
    assert copy_artifact(artifact, str(tmp_path / "copy"), told.append)
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    assert (tmp_path / "copy" / "empty.bin").read_bytes() == b""
    assert sum(told) == artifact.manifest.size
    open_artifact(str(tmp_path / "copy")).verify()


def test_a_few_buffers_serve_for_a_file_that_is_verified(s3: str, tmp_path: Path) -> None:
    artifact = weights(s3, tmp_path)
    sizes, buffers = [], set()
    for part in streams.passing_file(artifact.file_url(NAME), artifact.manifest.files[NAME]):
        sizes.append(len(part))
        buffers.add(id(part.obj))
    assert len(buffers) <= streams.READS_IN_FLIGHT < len(sizes)
    assert sum(sizes) == artifact.manifest.files[NAME].size


def test_parts_become_smaller_to_the_end_of_a_file(
    proxy: FaultProxy, proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "reading_of", lambda place: Pace(2, 2))
    artifact = weights(proxied, tmp_path)
    proxy.reset()
    copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)
    sizes = [size_of(request) for request in proxy.requests if NAME in request.path and "Range" in request.headers]
    assert sizes[0] > 2 * sizes[-2]
    assert sum(sizes) == artifact.manifest.files[NAME].size


def size_of(request: Request) -> int:
    first, last = request.headers["Range"].removeprefix("bytes=").split("-")
    return int(last) + 1 - int(first)


def test_a_part_that_was_cut_off_goes_on_where_it_was(
    proxy: FaultProxy, proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "LEAST_PART_BYTES", 8 << 20)
    artifact = weights(proxied, tmp_path)
    counted = itertools.count()

    def cut(request: Request) -> Fault | None:
        is_third = "Range" in request.headers and request.method == "GET" and next(counted) == 2
        return Fault("cut_answer") if is_third else None

    proxy.reset(cut)
    assert copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)
    asked = [request.headers["Range"] for request in proxy.requests if "Range" in request.headers]
    ends = [span.split("-")[1] for span in asked]
    (again,) = {end for end in ends if ends.count(end) > 1}
    first, second = (int(span.split("=")[1].split("-")[0]) for span in asked if span.endswith(f"-{again}"))
    assert second > first
    assert (tmp_path / "copy" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()


def test_a_fetch_goes_on_behind_the_first_gap_of_a_killed_one(proxy: FaultProxy, proxied: str, tmp_path: Path) -> None:
    artifact = weights(proxied, tmp_path)
    proxy.reset()
    content, target = (tmp_path / NAME).read_bytes(), tmp_path / "fetched"
    with open(target, "wb") as file:  # as parts that are written side by side leave it
        file.write(content[: 8 << 20])
        file.seek(16 << 20)
        file.write(content[16 << 20 : 17 << 20])
    told: list[int] = []
    fetching.fetch_file(artifact.file_url(NAME), artifact.manifest.files[NAME], target, told.append)
    assert target.read_bytes() == content
    assert sum(told) == len(content)
    assert sum(size_of(request) for request in proxy.requests if "Range" in request.headers) <= len(content) - (7 << 20)


class Narrowing:
    """A pace of eight requests, until all eight have ended; then, asked at one moment where that can be, of two."""

    def __init__(self) -> None:
        self.ended, self.asked = threading.Barrier(8), threading.Barrier(8)
        self.is_narrow = False

    @property
    def width(self) -> int:
        if self.is_narrow:
            with suppress(threading.BrokenBarrierError):
                self.asked.wait(0.2)
            return 2
        return 8

    @contextmanager
    def request(self) -> Iterator[None]:
        yield
        if not self.is_narrow:
            self.ended.wait(30)
            self.is_narrow = True

    def passed(self, size: int) -> None:
        pass


def test_requests_that_become_too_many_at_once_do_not_all_end(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, pace = weights(s3, tmp_path), Narrowing()
    monkeypatch.setattr(fetching, "reading_of", lambda place: pace)
    entry, target = artifact.manifest.files[NAME], tmp_path / "fetched"
    fetch = threading.Thread(target=fetching.fetch_file, args=[artifact.file_url(NAME), entry, target], daemon=True)
    fetch.start()
    fetch.join(60)
    assert not fetch.is_alive()
    assert target.read_bytes() == (tmp_path / NAME).read_bytes()


def test_an_interrupted_fetch_leaves_no_gap(s3: str, tmp_path: Path) -> None:
    artifact = weights(s3, tmp_path)
    content, target = (tmp_path / NAME).read_bytes(), tmp_path / "fetched"

    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetching.fetch_file(artifact.file_url(NAME), artifact.manifest.files[NAME], target, interrupt)
    left = target.read_bytes()
    assert left
    assert content.startswith(left)


def test_a_full_disk_is_told_as_one_and_not_as_trouble_of_the_store(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = weights(s3, tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFullError, match=r"cannot write .*copy"):
        copy_artifact(artifact, str(tmp_path / "copy"), lambda size: None)


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
    pwrite = os.pwrite

    def pwrite_or_fail(*arguments: Any) -> int:
        if next(counted) == 1:
            raise TimeoutError("timed out")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite_or_fail)
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
