"""Decompress a file by the ending of its name, as a stream: gzip, bzip2, xz and Zstandard, of one or more members."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from checkpoints.redact import redact
from modularforge.data.content import describe
from modularforge.data.patterns import file_part
from modularforge.errors import DataError, one_line

# Fed to a decompressor at once: repetitive text grows a thousandfold.
COMPRESSED_BYTES = 1 << 13
# `zstd --long=31` is the longest there is; the window is memory that such a file takes while it is read.
ZSTD_WINDOW = 1 << 31
COPY_AGAIN = "copy or download it again"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


def compression_of(url: str) -> str | None:
    """The ending that names the compression of a file, or None for a plain file."""
    return next((ending for ending in DECOMPRESSORS if file_part(url).lower().endswith(ending)), None)


def decompress(file: Any, ending: str, url: str) -> Iterator[bytes]:
    """What an open file holds; `url` names it in the DataError when it is cut off or damaged."""
    chunks = iter(lambda: file.read(COMPRESSED_BYTES), b"")
    return _members(chunks, DECOMPRESSORS[ending], url)


def _members(chunks: Iterator[bytes], new_decompressor: Callable[[], _Decompressor], url: str) -> Iterator[bytes]:
    """Decompress a file of one or more members (gzip) or frames (zstd), which may be padded with zeros."""
    decompressor, started = new_decompressor(), False
    for chunk in chunks:
        while chunk := chunk if started else chunk.lstrip(b"\0"):
            try:
                yield decompressor.decompress(chunk)
            except Exception as error:  # each library has an error class of its own
                raise _damaged(url, *_what_it_is(url, chunk, started, error)) from error
            started, chunk = not decompressor.eof, decompressor.unused_data if decompressor.eof else b""
            decompressor = decompressor if started else new_decompressor()
    if started:
        raise _damaged(url, "ends in the middle")


def _what_it_is(url: str, chunk: bytes, started: bool, error: Exception) -> tuple[str, str]:
    """What the file is instead, and what to do."""
    if started:
        return f"is damaged ({one_line(error)})", COPY_AGAIN
    if found := describe(chunk):
        return f"is {found[0]}", found[1] or "leave it out of the settings"
    cure = f"{COPY_AGAIN}, or take {compression_of(url)} from its name if it is plain"
    return f"is damaged or not compressed ({one_line(error)})", cure


def _damaged(url: str, what: str, cure: str = COPY_AGAIN) -> DataError:
    return DataError(f"{redact(url)} must be a whole {compression_of(url)} file, but {what}; {cure}")
