"""Find, open, decompress and decode the files of a corpus, as a stream.

Reads any path, URL or glob that fsspec knows, and ``sample:`` paths inside this package. Only a chunk of a file is in
memory at a time. Whatever is damaged becomes one sentence with the file's name, line and byte.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, Protocol

from checkpoints import paths
from modularforge.data.locations import real_location
from modularforge.errors import DataError

CHUNK_BYTES = 1 << 17
# Fed to a decompressor at once: repetitive text grows a thousandfold.
COMPRESSED_BYTES = 1 << 13
SAMPLE_PREFIX = "sample:"


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


def find_files(locations: str | list[str]) -> list[str]:
    """Paths, URLs and globs as a list of file URLs, those of a glob sorted; raises DataError where nothing matches."""
    patterns = [locations] if isinstance(locations, str) else locations
    return [url for pattern in patterns for url in _expand(real_location(pattern))]


def compression_of(url: str) -> str | None:
    """The ending that names the compression of a file, or None for a plain file."""
    return next((ending for ending in DECOMPRESSORS if url.lower().endswith(ending)), None)


@contextmanager
def open_bytes(url: str) -> Iterator[Any]:
    """Open one file for binary reading; what the storage refuses, then or while reading, becomes a DataError."""
    try:
        filesystem, path = paths.filesystem(url)
        with filesystem.open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(
            f"{url} must be a file of the corpus, but does not exist; mend the path in data.sources"
        ) from error
    except IsADirectoryError as error:
        raise DataError(
            f"{url} must be a file, but is a folder; name its files, for example {url}/*.jsonl.gz"
        ) from error
    except OSError as error:
        raise DataError(
            f"{url} must be readable, but the storage says: {error}; mend the path or its permissions"
        ) from error


def read_text(url: str) -> Iterator[str]:
    """The text of a file in pieces of some kilobytes; raises DataError with line and byte where it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed_bytes, line = 0, 1
    for chunk in _with_end(_decompressed(url)):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(url, line, consumed_bytes - pending + error.start, error) from error
        text = text.removeprefix("\ufeff") if consumed_bytes == 0 else text
        consumed_bytes += len(chunk)
        line += text.count("\n")
        yield text


def read_lines(url: str) -> Iterator[str]:
    """The lines of a text file without their line ends."""
    pieces: list[str] = []
    for text in read_text(url):
        head, *rest = text.split("\n")
        pieces.append(head)
        if rest:
            yield "".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
    if last := "".join(pieces):
        yield last


def _expand(pattern: str) -> list[str]:
    if pattern.startswith(SAMPLE_PREFIX):
        pattern = str(resources.files("modularforge.data") / "sample" / pattern.removeprefix(SAMPLE_PREFIX))
    if not any(character in pattern for character in "*?["):
        return [pattern]
    filesystem, path = paths.filesystem(pattern)
    found = sorted(match for match in filesystem.glob(path) if filesystem.isfile(match))
    if not found:
        raise DataError(f"{pattern} must match files of the corpus, but matches none; mend the pattern in data.sources")
    return found if paths.is_local(pattern) else [filesystem.unstrip_protocol(match) for match in found]


def _decompressed(url: str) -> Iterator[bytes]:
    ending = compression_of(url)
    with open_bytes(url) as file:
        size = CHUNK_BYTES if ending is None else COMPRESSED_BYTES
        chunks = iter(lambda: file.read(size), b"")
        yield from chunks if ending is None else _members(chunks, DECOMPRESSORS[ending], url)


def _members(chunks: Iterator[bytes], new_decompressor: Callable[[], _Decompressor], url: str) -> Iterator[bytes]:
    """Decompress a file of one or more members (gzip) or frames (zstd), which may be padded with zeros."""
    decompressor, started = new_decompressor(), False
    for chunk in chunks:
        while chunk := chunk if started else chunk.lstrip(b"\0"):
            try:
                yield decompressor.decompress(chunk)
            except Exception as error:  # each library has an error class of its own
                raise _damaged(url, f"is damaged ({error})") from error
            started, chunk = not decompressor.eof, decompressor.unused_data if decompressor.eof else b""
            decompressor = decompressor if started else new_decompressor()
    if started:
        raise _damaged(url, "ends in the middle")


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from (chunk for chunk in chunks if chunk)
    yield b""


def _damaged(url: str, what: str) -> DataError:
    return DataError(f"{url} must be a whole {compression_of(url)} file, but {what}; copy or download it again")


def _not_utf8(url: str, line: int, offset: int, error: UnicodeDecodeError) -> DataError:
    found = error.object[error.start : error.start + 1].hex()
    return DataError(
        f"{url} must be UTF-8 text, but byte {offset} (line {line}) is 0x{found}; "
        "convert the file (iconv -f LATIN1 -t UTF-8) or leave it out of data.sources"
    )
