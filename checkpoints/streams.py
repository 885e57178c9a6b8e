"""Files as streams of their bytes, hashed on the way, by others where there are cores for it.

What is read is compared with the entry of a manifest while it passes: size, digest, tensor by tensor. What is written
comes in pieces that stay as they are, and is flushed while it still comes.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

from checkpoints import paths
from checkpoints.digests import named, short
from checkpoints.errors import CorruptArtifactError
from checkpoints.folder import DurableFile
from checkpoints.hashing import CHUNK_BYTES, FileEntry, FileHasher, hash_file
from checkpoints.parallel import in_order
from checkpoints.retry import call
from checkpoints.s3 import PART_BYTES

READS_IN_FLIGHT = 8
LOCAL_READS_AHEAD = 2
NAMES_IN_MESSAGE = 3
REMEDY = "restore it from a copy (python -m checkpoints pull), or delete the artifact and make it again"
Chunk = bytes | memoryview


def stream_file(url: str, entry: FileEntry) -> Iterator[bytes]:
    """The file in parts, in order, fetched a few ahead; a changed byte is CorruptArtifactError after the last part."""
    hasher = FileHasher(url, entry.digest)
    check_size(url, entry)
    try:
        with hasher.in_background(entry.size) as update:
            for part in stream_span(url, 0, entry.size):
                update(part)
                yield part
    except FileNotFoundError as error:  # deleted since its size was asked
        raise missing(url) from error
    check_hash(url, entry, hasher)


def passing_file(url: str, entry: FileEntry) -> Iterator[memoryview]:
    """The file as `stream_file` gives it, in large parts of which each is there only until the next is asked for.

    A part is hashed while the caller does what it does with it.
    """
    hasher = FileHasher(url, entry.digest)
    check_size(url, entry)
    try:
        for part in _filled_again(url, entry.size):
            with hasher.beside(part):
                yield part
    except FileNotFoundError as error:  # deleted since its size was asked
        raise missing(url) from error
    check_hash(url, entry, hasher)


def _filled_again(url: str, size: int) -> Iterator[memoryview]:
    """A file in parts, in order, fetched a few ahead; each is there until the next is asked for.

    A few buffers serve for all: fresh memory of a whole file was 110,000 page faults for 512 MiB, much of the system's
    time of a download.
    """
    store, ahead = paths.store_of(url), LOCAL_READS_AHEAD if paths.is_local(url) else READS_IN_FLIGHT
    spans = [(first, min(first + PART_BYTES, size)) for first in range(0, size, PART_BYTES)]
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in spans[:ahead]:  # no more than there are parts: a bytearray is written over when it is made
        free.put(memoryview(bytearray(min(PART_BYTES, size))))

    def fill(span: tuple[int, int]) -> tuple[memoryview, int]:
        buffer = free.get()
        return buffer, store.read_into(url, span[0], buffer[: span[1] - span[0]])

    for buffer, filled in in_order(fill, spans, ahead):
        yield buffer[:filled]
        free.put(buffer)


def stream_span(url: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of a file in parts, in order, fetched a few ahead; the caller compares them with a hash."""
    return (_local_parts if paths.is_local(url) else _remote_parts)(url, start, end)


def _local_parts(url: str, start: int, end: int) -> Iterator[bytes]:
    with call("read", url, lambda: open(paths.local_path(url), "rb", buffering=0)) as file:
        file.seek(start)
        while part := call("read", url, lambda: file.read(min(CHUNK_BYTES, end - file.tell()))):
            yield part


def _remote_parts(url: str, start: int, end: int) -> Iterator[bytes]:
    store = paths.store_of(url)
    spans = ((first, min(first + PART_BYTES, end)) for first in range(start, end, PART_BYTES))
    return chain.from_iterable(in_order(lambda span: store.read_pieces(url, *span), spans, READS_IN_FLIGHT))


def check_size(url: str, entry: FileEntry) -> None:
    """Raise CorruptArtifactError when the file is missing, shorter or longer than its entry says."""
    try:
        compare_size(url, entry, paths.file_size(url))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(url) from error


def compare_size(url: str, entry: FileEntry, size: int | None) -> None:
    """Raise CorruptArtifactError unless a file has the size that its entry says; None for one that is missing."""
    if size is None:
        raise missing(url)
    if size != entry.size:
        state = "truncated" if size < entry.size else "too long"
        raise CorruptArtifactError(f"{url} must have {entry.size} bytes, but has {size} ({state}); {REMEDY}")


def missing(url: str) -> CorruptArtifactError:
    """What is wrong where a file that a manifest names is not there."""
    return CorruptArtifactError(f"{url} must be there, as a manifest names it, but is missing; {REMEDY}")


def check_hash(url: str, entry: FileEntry, found: FileHasher) -> None:
    """Raise CorruptArtifactError, with the names of the damaged tensors, unless the bytes are those of the entry."""
    if found.size == entry.size and found.digest == entry.digest:
        return
    raise CorruptArtifactError(
        f"{url} must have {short(entry.digest)}, but has {short(found.digest)}"
        f"{what_differs(entry, found.finished_tensors())}: {REMEDY}"
    )


def what_differs(entry: FileEntry, tensors: dict[str, str]) -> str:
    """Which part of a weight file differs and what that means, in words; a plain file cannot tell."""
    if not entry.tensors:
        return "; a bit flipped, or another version (an older one, say) was put in its place"
    damaged = [name for name, digest in entry.tensors.items() if tensors.get(name) != digest]
    if not damaged or not tensors.keys() & entry.tensors.keys():
        return " (damaged: the header); a bit flipped there, or a file of other tensors was put in its place"
    if len(damaged) == len(entry.tensors) > 1:
        return f" (all {len(damaged)} tensors differ); another version (an older one, say) was put in its place"
    more = f" and {len(damaged) - NAMES_IN_MESSAGE} more" if len(damaged) > NAMES_IN_MESSAGE else ""
    names = f"{', '.join(damaged[:NAMES_IN_MESSAGE])}{more}"
    return f" (damaged: tensor {names}, {len(damaged)} of {len(entry.tensors)}); the others are right, so bits flipped"


def check_local_file(path: Path, entry: FileEntry) -> Path:
    """Compare a local file with its entry; a file that did not change since is hashed once per process."""
    check_size(str(path), entry)
    status = path.stat()
    check_hash(str(path), entry, _hash_once(path, status.st_size, status.st_mtime_ns, status.st_ino, entry.algorithm))
    return path


@lru_cache(maxsize=4096)
def _hash_once(path: Path, size: int, modified: int, inode: int, algorithm: str) -> FileHasher:
    return hash_file(path, named(algorithm, ""))


def write_local(path: Path, chunks: Iterable[Chunk], hasher: FileHasher) -> None:
    """Write and flush in this thread while others hash, so that hashing costs no time where there are cores for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, hasher.in_background() as hash_later, DurableFile(file) as target:
        for piece in steady_pieces(chunks):
            hash_later(piece)
            target.write(piece)


def continue_local(path: Path, chunks: Iterable[Chunk], size: int) -> None:
    """Write a file, or the rest of it: bytes that an interrupted writer left are read and compared instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and paths.check_regular(path).st_nlink > 1:
        path.unlink()  # another name of another artifact's file, which must stay as it is
    with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file, DurableFile(file) as target:
        left = os.fstat(file.fileno()).st_size
        for chunk in chunks:
            if left:
                found = file.read(len(chunk))
                if found == chunk:
                    left -= len(found)
                    continue
                left = 0
                file.seek(-len(found), os.SEEK_CUR)
            target.write(chunk)
        file.truncate(size)


def passed_to(update: Callable[[Chunk], None], pieces: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same pieces, each shown to `update` first."""
    for piece in pieces:
        update(piece)
        yield piece


def steady_pieces(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same bytes in pieces of at most 1 MiB that stay as they are when the caller fills its buffer again."""
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK_BYTES):
            piece = memoryview(chunk)[start : start + CHUNK_BYTES]
            yield piece if piece.readonly else bytes(piece)


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a local file."""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
