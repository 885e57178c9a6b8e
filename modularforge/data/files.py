"""Find, open, decompress and decode the files of a corpus, as a stream.

Reads any path, URL or pattern that fsspec knows, and ``sample:`` paths inside this package. Only a chunk of a file is
in memory at a time. Whatever is damaged, or something else than its name says, becomes one sentence with the file's
name, line and byte. Names in messages carry no passwords or signatures.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from importlib import resources

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.data.compression import compression_of, decompress
from modularforge.data.content import HEAD_BYTES, require_text
from modularforge.data.locations import real_location
from modularforge.data.opening import explained, open_bytes
from modularforge.data.patterns import is_pattern, match_local, match_remote
from modularforge.errors import DataError

CHUNK_BYTES = 1 << 17
# A record, or an article's line, of more characters is no line: the whole file would end up in memory.
LINE_CHARACTERS = 1 << 28
SAMPLE_PREFIX = "sample:"


def find_files(locations: str | list[str]) -> list[str]:
    """Paths, URLs and patterns as a list of files, each once, those of a pattern sorted; DataError without a match."""
    found: dict[str, str] = {}
    for url in all_matches(locations):
        found.setdefault(file_identity(url), url)
    return list(found.values())


def all_matches(locations: str | list[str]) -> list[str]:
    """The same with files that are matched or named twice, by any of their names."""
    patterns = [locations] if isinstance(locations, str) else locations
    return [url for pattern in patterns for url in _expand(real_location(pattern))]


def file_identity(url: str) -> str:
    """What is the same for two names of one file: without links and detours on this machine, the URL elsewhere."""
    return os.path.realpath(paths.local_path(url)) if paths.is_local(url) else url


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
            raise _not_utf8(redact(url), line, consumed_bytes - pending + error.start, error) from error
        text = text.removeprefix("\ufeff") if consumed_bytes == 0 else text
        consumed_bytes += len(chunk)
        line += text.count("\n")
        yield text


def read_lines(url: str) -> Iterator[str]:
    """The lines of a text file without their line ends."""
    pieces: list[str] = []
    characters = 0
    for text in read_text(url):
        head, *rest = text.split("\n")
        pieces.append(head)
        characters += len(head)
        if characters > LINE_CHARACTERS:
            raise DataError(
                f"{redact(url)} must have lines of at most {LINE_CHARACTERS:,} characters, but has a longer one; "
                "write one record a line, or set format: text for this source"
            )
        if rest:
            yield "".join(pieces)
            yield from rest[:-1]
            pieces, characters = [rest[-1]], len(rest[-1])
    if last := "".join(pieces):
        yield last


def _expand(location: str) -> list[str]:
    if location.startswith(SAMPLE_PREFIX):
        return [str(resources.files("modularforge.data") / "sample" / location.removeprefix(SAMPLE_PREFIX))]
    if not is_pattern(location):
        return [location]
    with explained(location):
        found = match_local(location) if paths.is_local(location) else match_remote(location)
    if not found:
        raise DataError(
            f"{redact(location)} must match files of the corpus, but matches none (hidden ones only where the pattern "
            "names their dot); mend the pattern in the settings"
        )
    return found


def _decompressed(url: str) -> Iterator[bytes]:
    """The bytes of the text in a file, which was found to begin as text."""
    ending = compression_of(url)
    with open_bytes(url, is_stream=True) as file:
        if ending is None:
            yield from _checked(iter(lambda: file.read(CHUNK_BYTES), b""), url)
            return
        yield from _checked(decompress(file, ending, url), url, ending)


def _checked(chunks: Iterator[bytes], url: str, ending: str = "") -> Iterator[bytes]:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    require_text(redact(url), head[:HEAD_BYTES], ending)
    yield head
    yield from chunks


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from (chunk for chunk in chunks if chunk)
    yield b""


def _not_utf8(name: str, line: int, offset: int, error: UnicodeDecodeError) -> DataError:
    found = error.object[error.start : error.start + 1].hex()
    return DataError(
        f"{name} must be UTF-8 text, but byte {offset} (line {line}) is 0x{found}; find out the encoding of the file "
        "and convert it (iconv -f ENCODING -t UTF-8), or leave it out of the settings"
    )
