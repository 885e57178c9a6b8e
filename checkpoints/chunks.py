"""Bytes on their way into files: in pieces that stay as they are, written and flushed while others hash them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from checkpoints import paths
from checkpoints.durable import DurableFile
from checkpoints.hashing import CHUNK_BYTES, FileHasher

Chunk = bytes | memoryview


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


def in_parts(chunks: Iterable[Chunk], part_bytes: int) -> Iterator[bytes]:
    """The same bytes in parts of one size, the last one shorter; chunks must stay as they are until the next part."""
    pieces: list[memoryview] = []
    missing = part_bytes
    for chunk in chunks:
        rest = memoryview(chunk)
        while len(rest) >= missing:
            yield b"".join([*pieces, rest[:missing]])
            rest, pieces, missing = rest[missing:], [], part_bytes
        if len(rest):
            pieces.append(rest)
            missing -= len(rest)
    if pieces:
        yield b"".join(pieces)


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
