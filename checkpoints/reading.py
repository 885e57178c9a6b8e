"""Reads files that a manifest names and compares them with it while they pass: size, sha256, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

from checkpoints import paths
from checkpoints.errors import CorruptArtifactError
from checkpoints.hashing import CHUNK_BYTES, FileEntry, FileHasher, hash_file
from checkpoints.parallel import in_order
from checkpoints.retry import call

PART_BYTES = 16 << 20
READS_IN_FLIGHT = 8
NAMES_IN_MESSAGE = 3
REMEDY = "restore it from a copy (python -m checkpoints pull), or delete the artifact and make it again"


def stream_file(url: str, entry: FileEntry, hasher: FileHasher | None = None) -> Iterator[bytes]:
    """The file in parts, in order, fetched a few ahead; a changed byte is CorruptArtifactError after the last part.

    A `hasher` that has taken the first bytes already (of an earlier, interrupted reading) continues behind them.
    """
    hasher = hasher or FileHasher(url)
    check_size(url, entry)
    parts = _local_parts if paths.is_local(url) else _remote_parts
    try:
        with hasher.in_background(entry.size) as update:
            for part in parts(url, hasher.size, entry.size):
                update(part)
                yield part
    except FileNotFoundError as error:  # deleted since its size was asked
        raise _missing(url) from error
    check_hash(url, entry, hasher)


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
        size = paths.file_size(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(url) from error
    if size != entry.size:
        state = "truncated" if size < entry.size else "too long"
        raise CorruptArtifactError(f"{url} must have {entry.size} bytes, but has {size} ({state}); {REMEDY}")


def _missing(url: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{url} must be there, as a manifest names it, but is missing; {REMEDY}")


def check_hash(url: str, entry: FileEntry, found: FileHasher) -> None:
    """Raise CorruptArtifactError, with the names of the damaged tensors, unless the bytes are those of the entry."""
    if found.size == entry.size and found.sha256 == entry.sha256:
        return
    raise CorruptArtifactError(
        f"{url} must have sha256 {entry.sha256[:12]}, but has {found.sha256[:12]}"
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
    check_hash(str(path), entry, _hash_once(path, status.st_size, status.st_mtime_ns, status.st_ino))
    return path


@lru_cache(maxsize=4096)
def _hash_once(path: Path, size: int, modified: int, inode: int) -> FileHasher:
    return hash_file(path)
