"""Find, open, decompress and decode the files of a corpus, as a stream.

Reads any path, URL or pattern that fsspec knows, and ``sample:`` paths inside this package. Only a chunk of a file is
in memory at a time. Whatever is damaged, or something else than its name says, becomes one sentence with the file's
name, line and byte. Names in messages carry no passwords or signatures.

Settings are saved beside every output, so a password or a signature in a URL is taken out of the saved copy. Where jobs
read that copy, `${NAME}` names an environment variable, and only here it becomes its value.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import fsspec

from checkpoints import paths
from checkpoints.redact import is_redacted, redact
from modularforge.data.compression import HEAD_BYTES, compression_of, decompress, require_text
from modularforge.data.patterns import is_pattern, is_web, match_local, match_remote
from modularforge.errors import DataError, one_line

CHUNK_BYTES = 1 << 17
# A record, or an article's line, of more characters is no line: the whole file would end up in memory.
LINE_CHARACTERS = 1 << 28
SAMPLE_PREFIX = "sample:"
SILENCE_SECONDS = 120.0
# Libraries through which file systems of fsspec ask servers; each raises exceptions of its own.
CLIENTS = ("aiohttp", "azure", "ftplib", "google", "httpx", "httpx2", "paramiko", "requests", "urllib3")
Span = tuple[int, int]
"""Bytes of a file, from the first to before the last."""
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


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


def read_text(url: str, span: Span | None = None) -> Iterator[str]:
    """The text of a file in pieces of some kilobytes; raises DataError with line and byte where it is not UTF-8.

    Of a file that is not compressed, `span` gives the lines that begin in it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed_bytes, line = 0, 1
    if span is not None and span[0]:
        consumed_bytes = _line_start(url, span[0])
    chunks = _checked(decompressed(url), url) if span is None else _lines_within(url, consumed_bytes, span[1])
    for chunk in _with_end(chunks):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n") + (lines_before(url, span[0]) if span else 0)
            raise _not_utf8(redact(url), line, consumed_bytes - pending + error.start, error) from error
        text = text.removeprefix("\ufeff") if consumed_bytes == 0 else text
        consumed_bytes += len(chunk)
        line += text.count("\n")
        yield text


def read_lines(url: str, span: Span | None = None) -> Iterator[str]:
    """The lines of a text file without their line ends; with a span those that begin in it."""
    pieces: list[str] = []
    characters, number = 0, 1
    for text in read_text(url, span):
        head, *rest = text.split("\n")
        pieces.append(head)
        characters += len(head)
        if characters > LINE_CHARACTERS:
            number += lines_before(url, span[0]) if span else 0
            raise DataError(
                f"{redact(url)}:{number} must be a line of at most {LINE_CHARACTERS:,} characters, but is longer; "
                "write one record a line, or set format: text for this source"
            )
        number += len(rest)
        if rest:
            yield "".join(pieces)
            yield from rest[:-1]
            pieces, characters = [rest[-1]], len(rest[-1])
    if last := "".join(pieces):
        yield last


def lines_before(url: str, place: int) -> int:
    """Lines that begin before this byte, which only a message is worth counting."""
    left, count = place - 1, int(place > 0)
    with open_bytes(url) as file:
        while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _line_start(url: str, place: int) -> int:
    """Where the first line begins that begins at this byte or behind it."""
    place -= 1
    with open_bytes(url) as file:
        file.seek(place)
        while chunk := file.read(CHUNK_BYTES):
            if (end := int(chunk.find(b"\n"))) >= 0:
                return place + end + 1
            place += len(chunk)
    return place


def _lines_within(url: str, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start`, where a line begins, to the end of the last line that begins before `end`."""
    with open_bytes(url) as file:
        file.seek(start)
        if start == 0:
            require_text(redact(url), file.read(HEAD_BYTES), "")
            file.seek(0)
        while start < end and (chunk := file.read(CHUNK_BYTES)):
            if start + len(chunk) >= end:
                last = chunk.find(b"\n", end - 1 - start)
                while last < 0:  # a long line
                    yield chunk
                    if not (chunk := file.read(CHUNK_BYTES)):
                        return
                    last = chunk.find(b"\n")
                yield chunk[: last + 1]
                return
            yield chunk
            start += len(chunk)


def _expand(location: str) -> list[str]:
    if location.startswith(SAMPLE_PREFIX):
        return [str(resources.files("modularforge.data") / "sample" / location.removeprefix(SAMPLE_PREFIX))]
    if not is_pattern(location):
        return [location]
    with explained(location):
        found = match_local(location) if paths.is_local(location) else _listed(location)
    if not found:
        raise DataError(
            f"{redact(location)} must match files of the corpus, but matches none (hidden ones only where the pattern "
            "names their dot); fix the pattern in the settings"
        )
    return found


def _listed(location: str) -> list[str]:
    """Matches of a pattern on another machine, which may let files be read and not be listed."""
    try:
        return match_remote(location)
    except PermissionError as error:
        said = one_line(redact(str(error)))
        raise DataError(
            f"{redact(location)} must match files that may be listed, but the storage says: {said}; let it list them "
            "(s3:ListBucket), or name each file in the settings, which needs no list"
        ) from error


def decompressed(url: str) -> Iterator[bytes]:
    """The bytes in a file, decompressed by its ending, in pieces."""
    ending = compression_of(url)
    with open_bytes(url, is_stream=True) as file:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"") if ending is None else decompress(file, ending, url)


def _checked(chunks: Iterator[bytes], url: str) -> Iterator[bytes]:
    """The same of a file that is found to begin as text."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    require_text(redact(url), head[:HEAD_BYTES], compression_of(url) or "")
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


@contextmanager
def open_bytes(url: str, is_stream: bool = False) -> Iterator[Any]:
    """Open one file for binary reading; what the storage refuses, then or while reading, becomes a DataError.

    `is_stream`: it is read from the beginning to the end, which every web server can do.
    """
    with explained(url):
        if paths.is_local(url):
            with _open_regular(url) as file:
                yield file
            return
        filesystem, path = paths.filesystem(url, **_web_options(url))
        with filesystem.open(path, "rb", **({"block_size": 0} if is_stream and is_web(url) else {})) as file:
            yield file


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a storage says into a DataError with the name of the file."""
    name = redact(url)
    try:
        yield
    except FileNotFoundError as error:
        refusal = error.__cause__  # fsspec takes every answer of a web server, and none, for a missing file
        if _is_clients(refusal) and getattr(refusal, "status", None) != 404:
            raise _unreadable(name, refusal) from error
        raise DataError(f"{name} must be a file, but does not exist; fix its path in the settings") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{name} must be a file, but is a folder; name its files, for example {name.rstrip('/')}/{_usual(url)}, or "
            f"let `modularforge init {name}` write the settings"
        ) from error
    except (OSError, asyncio.TimeoutError) as error:
        if type(error).__name__ == "FileExpired":  # of s3fs, which reads all of an object or none
            raise DataError(
                f"{name} must stay as it is while it is read, but was written again or is gone; run again when nobody "
                "writes to it"
            ) from error
        raise _unreadable(name, error) from error
    except Exception as error:
        if not _is_clients(error):
            raise
        raise _unreadable(name, error) from error


def _usual(folder: str) -> str:
    """A pattern for what a folder holds most of: `**/*.txt`."""
    names = (
        [name for _, _, found in os.walk(paths.local_path(folder)) for name in found] if paths.is_local(folder) else []
    )
    endings = Counter("".join(Path(name).suffixes[-2:]) for name in names if not name.startswith("."))
    return f"**/*{endings.most_common(1)[0][0]}" if endings else "**/*.jsonl.gz"


def _web_options(url: str) -> dict[str, Any]:
    """Time for a web server to answer, but none for the whole file: a stream is read as slowly as it is tokenised."""
    if not is_web(url):
        return {}
    import aiohttp

    own = fsspec.config.conf.get(url.partition("://")[0], {}).get("client_kwargs", {})
    patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": patience, **own}}


def _unreadable(name: str, error: BaseException | None) -> DataError:
    said = one_line(redact(str(error) or type(error).__name__))
    return DataError(
        f"{name} must be readable, but the storage says: {said}; fix the path, its permissions or the network"
    )


def _open_regular(url: str) -> Any:
    path = paths.local_path(url)
    paths.check_regular(path)
    return open(path, "rb")


def _is_clients(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENTS


def real_location(location: str) -> str:
    """The location with the values of the variables it names; raises DataError where it cannot be opened as it is.

    A path that exists as it is written names no variables.
    """
    if VARIABLE.search(location) and paths.is_local(location) and paths.local_path(location).exists():
        return location
    if is_redacted(location):
        raise DataError(
            f"data.sources must say how to open {location}, but its secret is not saved with the settings; give the "
            "URL again with --set, or name an environment variable in it, such as https://${USER}:${PASSWORD}@host/x"
        )
    return VARIABLE.sub(_value, location)


def _value(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise DataError(
            f"data.sources must name environment variables that are set, but ${{{match[1]}}} is not; set it, and on a "
            "cluster name it in cluster.pass_environment"
        )
    return value
