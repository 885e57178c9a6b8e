"""Digests of a file and of each tensor in it, from one pass over its bytes.

The same hasher runs beside every write, upload, download and check, so no file is read a second time to be hashed.
Beside large files it runs in threads of its own, as sha256 takes as long as a fast disk (1.8 GiB/s on one core).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import digests
from checkpoints.errors import CorruptArtifactError
from checkpoints.parallel import consumer, meanwhile
from checkpoints.safetensors import LENGTH_BYTES, Header, header_length, parse_header

# Blocks of this size are used again by malloc; fresh ones of 16 MiB cost up to 2 s of page faults per GiB (measured).
CHUNK_BYTES = 1 << 20
WEIGHT_SUFFIX = ".safetensors"
CHUNKS_AHEAD = 32


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and digest of one file; for weight files also digests by tensor name, of the same algorithm."""

    size: int
    digest: str
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """What its digests are."""
        return digests.algorithm_of(self.digest)

    def to_values(self) -> dict[str, Any]:
        """What JSON says of it: the digests' digits, under the name of their algorithm."""
        tensors = {name: digests.digits_of(digest) for name, digest in self.tensors.items()}
        return {"size": self.size, self.algorithm: digests.digits_of(self.digest), "tensors": tensors}


class FileHasher:
    """Takes a file's bytes in order and in any pieces; `entry` then says what they were.

    `like` is a digest that it will be compared with; what is written has the algorithm that is chosen.
    """

    def __init__(self, name: str, like: str = "") -> None:
        self._name = name
        self._whole = digests.like(like)
        self._size = 0
        self._tensors = TensorHasher(name, like) if name.endswith(WEIGHT_SUFFIX) else None

    def update(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes."""
        for update in self._updates():
            update(chunk)

    @contextmanager
    def in_background(self, size: int | None = None) -> Iterator[Callable[[bytes | memoryview], None]]:
        """An `update` that returns at once; what it was given must stay as it is until the end of the body.

        The whole file and its tensors have a thread each, so that on two cores both hashes take the time of one. A file
        whose known `size` is one chunk is not worth a thread.
        """
        if size is not None and size <= CHUNK_BYTES:
            yield self.update
            return
        with ExitStack() as threads:
            updates = [threads.enter_context(consumer(update, CHUNKS_AHEAD)) for update in self._updates()]

            def update_later(chunk: bytes | memoryview) -> None:
                for update in updates:
                    update(chunk)

            yield update_later

    @contextmanager
    def beside(self, chunk: bytes | memoryview) -> Iterator[None]:
        """Take the next bytes in threads while the body of the `with` runs; at its end nobody reads them any more."""
        with ExitStack() as threads:
            for update in self._updates():
                if len(chunk) > CHUNK_BYTES:
                    threads.enter_context(meanwhile(partial(update, chunk)))
                else:
                    update(chunk)
            yield

    def entry(self) -> FileEntry:
        """What has been taken so far as a whole file; raises CorruptArtifactError for a weight file that is not one."""
        tensors = self._tensors.hashes() if self._tensors else {}
        return FileEntry(self._size, self._whole.text(), tensors)

    def _updates(self) -> list[Callable[[bytes | memoryview], None]]:
        return [self._update_whole, *([self._tensors.update] if self._tensors else [])]

    def _update_whole(self, chunk: bytes | memoryview) -> None:
        self._whole.update(chunk)
        self._size += len(chunk)

    @property
    def digest(self) -> str:
        """Hash of what has been taken so far, whatever it is."""
        return self._whole.text()

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._size

    def finished_tensors(self) -> dict[str, str]:
        """Hashes of the tensors that could be read so far, for reports on a damaged file."""
        return self._tensors.finished if self._tensors else {}


class TensorHasher:
    """Follows the header of a weight file and hashes each tensor's bytes as they pass."""

    def __init__(self, name: str, like: str = "") -> None:
        self._name = name
        self._like = like
        self._head = bytearray()
        self._wanted = LENGTH_BYTES
        self._header: Header | None = None
        self._spans: list[tuple[int, str]] = []
        self._next = 0
        self._position = 0
        self._digest = digests.like(like)
        self._broken = ""
        self.finished: dict[str, str] = {}

    def update(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes; a header that cannot be read is reported by `hashes`."""
        chunk = memoryview(chunk)
        if self._header is None and not self._broken:
            chunk = self._take_header(chunk)
        if self._header is not None:
            self._take_data(chunk)

    def hashes(self) -> dict[str, str]:
        """Hash by tensor name; raises CorruptArtifactError unless header and all tensors were there, and no more."""
        if reason := self._broken or self._why_not_whole():
            raise CorruptArtifactError(f"{self._name} must be a whole weight file, but {reason}; write it again")
        return dict(sorted(self.finished.items()))

    def _why_not_whole(self) -> str:
        if self._header is None:
            return "it ends too early"
        try:
            self._header.check_size(self._header.data_start + self._position)
        except ValueError as error:
            return str(error)
        return ""

    def _take_header(self, chunk: memoryview) -> memoryview:
        """Collect the length, then the header; what is left of the chunk are tensors."""
        try:
            while self._header is None and len(self._head) + len(chunk) >= self._wanted:
                taken = self._wanted - len(self._head)
                self._head += chunk[:taken]
                chunk = chunk[taken:]
                if self._wanted == LENGTH_BYTES and (length := header_length(self._head)):
                    self._wanted += length
                else:
                    self._begin(parse_header(self._head[LENGTH_BYTES:]))
        except ValueError as error:
            self._broken = f"its header cannot be read ({error})"
        if self._header is None:
            self._head += chunk
        return chunk

    def _begin(self, header: Header) -> None:
        self._header = header
        self._spans = [(entry.end, name) for name, entry in header.tensors.items()]
        self._head.clear()
        self._finish_tensors()

    def _take_data(self, chunk: memoryview) -> None:
        while len(chunk) and self._next < len(self._spans):
            taken = min(len(chunk), self._spans[self._next][0] - self._position)
            self._digest.update(chunk[:taken])
            self._position += taken
            chunk = chunk[taken:]
            self._finish_tensors()
        self._position += len(chunk)  # more than the header says

    def _finish_tensors(self) -> None:
        while self._next < len(self._spans) and self._spans[self._next][0] <= self._position:
            self.finished[self._spans[self._next][1]] = self._digest.text()
            self._digest = digests.like(self._like)
            self._next += 1


def hash_file(path: Path, like: str = "") -> FileHasher:
    """Hash a local file from its first byte to its last, to compare it with a digest or to write it down."""
    hasher = FileHasher(path.name, like)
    with open(path, "rb", buffering=0) as file, hasher.in_background(path.stat().st_size) as update:
        while chunk := file.read(CHUNK_BYTES):
            update(chunk)
    return hasher


def describe_file(path: Path) -> FileEntry:
    """Size and hashes of a local file; raises CorruptArtifactError for a weight file that is not whole."""
    return hash_file(path).entry()
