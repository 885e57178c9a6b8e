"""Web archives (WARC, and WET, which holds their text): one document a page, without its markup.

Read are records of text that somebody has extracted (`conversion`), and answers and files in HTML or plain text, each
in the encoding that it names. A page that is not in its encoding, or in a compression that the standard library has
not, is left out and counted in one warning; an archive that is cut off or is none is refused with the place.
Boilerplate is the business of `data.clean`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

from checkpoints.redact import redact
from modularforge.config import SourceConfig
from modularforge.data.compression import COPY_AGAIN, describe
from modularforge.data.files import decompressed
from modularforge.errors import DataError
from modularforge.log import logger

Headers = Mapping[str, str]
TYPES = ("conversion", "response", "resource")
TEXTS, PAGES = ("text/plain",), ("text/html", "application/xhtml+xml")
MOST_BYTES = 1 << 24  # of a page; larger ones are no pages
HEADER_BYTES = 1 << 16
SPACE_BYTES = 1 << 17
CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
SILENT = frozenset(("script", "style", "noscript", "template", "svg", "head", "iframe", "object"))
INLINE = frozenset(
    ("a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s", "samp", "small",
     "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr")
)  # fmt: skip


def read_archive(url: str, source: SourceConfig) -> Iterator[tuple[str, None]]:
    """The text of each page; raises DataError where the file is no web archive, or is cut off."""
    name, left_out = redact(url), Counter[str]()
    for headers, content in _records(_Bytes(decompressed(url)), name):
        try:
            text = _text_of(headers, content)
        except (UnicodeDecodeError, LookupError):
            left_out["not in the encoding that they name"] += 1
        except (ValueError, zlib.error):
            left_out["compressed in another way, or cut off"] += 1
        else:
            if text.strip():
                yield text, None
    for why, count in left_out.items():
        logger.warning("%s: %d pages are %s; they are left out", name, count, why)


class _Bytes:
    """A stream of pieces, by lines and counts."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.held, self.place = pieces, bytearray(), 0

    def _fill(self, count: int) -> bool:
        """Hold so many bytes, or all that there are; whether there are so many."""
        while len(self.held) < count:
            piece = next(self.pieces, None)
            if piece is None:
                return False
            self.held += piece
        return True

    def take(self, count: int) -> bytes:
        self._fill(count)
        found = bytes(self.held[:count])
        del self.held[:count]
        self.place += len(found)
        return found

    def skip(self, count: int) -> int:
        """Pass over so many bytes without holding them; returns how many there were."""
        done = 0
        while done < count and (piece := self.take(min(count - done, SPACE_BYTES))):
            done += len(piece)
        return done

    def until(self, mark: bytes, limit: int) -> bytes | None:
        """Up to and with the mark; None where it does not come in so many bytes."""
        start = 0
        while (found := self.held.find(mark, start)) < 0:
            start = max(0, len(self.held) - len(mark))
            if len(self.held) >= limit or not self._fill(len(self.held) + 1):
                return None
        return self.take(found + len(mark))

    def at_end(self) -> bool:
        """Whether nothing but empty lines is left."""
        while self._fill(1) and self.held[0] in b"\r\n":
            self.take(1)
        return not self.held


def _records(stream: _Bytes, name: str) -> Iterator[tuple[Headers, bytes]]:
    """The records that may be text."""
    while not stream.at_end():
        start = stream.place
        head = stream.until(b"\r\n\r\n", HEADER_BYTES)
        if head is None or not head.startswith(b"WARC/"):
            what = describe(bytes(stream.held[:4096])) if start == 0 else None
            raise DataError(
                f"{name} must be a web archive (WARC), but byte {start} "
                f"{'is the first of ' + what[0] if what else 'begins no record'}; {COPY_AGAIN}, or set the format of "
                "this source"
            )
        headers = _headers(head)
        length = headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise DataError(f"{name} must say how long each record is, but that at byte {start} does not; {COPY_AGAIN}")
        size = int(length)
        is_wanted = headers.get("warc-type") in TYPES and size <= MOST_BYTES and _may_be_text(headers)
        content = stream.take(size) if is_wanted else b""
        if (len(content) if is_wanted else stream.skip(size)) != size:
            raise DataError(f"{name} must be whole, but ends within the record at byte {start}; {COPY_AGAIN}")
        if is_wanted:
            yield headers, content


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _may_be_text(headers: Headers) -> bool:
    found = headers.get("warc-identified-payload-type")
    return found is None or found in (*TEXTS, *PAGES)


def _text_of(headers: Headers, content: bytes) -> str:
    """The text of a record, empty where it has none; raises UnicodeDecodeError, LookupError, ValueError, zlib.error."""
    if headers["warc-type"] == "conversion":
        return content.decode()
    if headers.get("content-type", "").startswith("application/http"):
        head, _, content = content.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        headers = _headers(head)
        if not status or not status[0].startswith(b"2"):
            return ""
        content = _plain(headers, content)
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    if kind.strip() not in (*TEXTS, *PAGES):
        return ""
    named = re.search(r"charset\s*=\s*\"?([\w:.-]+)", parameters)
    meta = CHARSET.search(content[:2048]) if kind.strip() in PAGES and not named else None
    text = content.decode(named[1] if named else meta[1].decode() if meta else "utf-8").removeprefix("\ufeff")
    return text if kind.strip() in TEXTS else _without_markup(text)


def _plain(headers: Headers, content: bytes) -> bytes:
    """The body of an answer without the encodings it was sent in; crawlers may have taken them off already."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        content = _joined(content)
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding in ("gzip", "x-gzip", "deflate"):
        found = zlib.decompressobj(wbits=47)
        plain = found.decompress(content, MOST_BYTES)
        if not found.eof:
            raise ValueError("it is cut off, or too large")
        return plain
    if encoding not in ("identity", ""):
        raise ValueError("it is compressed in another way")
    return content


def _joined(content: bytes) -> bytes:
    pieces: list[bytes] = []
    place = 0
    while True:
        size, _, _ = content[place : place + 32].partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if length <= 0:
            return b"".join(pieces)
        start = place + len(size) + 2
        pieces.append(content[start : start + length])
        place = start + length + 2


def _without_markup(page: str) -> str:
    parser = _Page()
    parser.feed(page)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


class _Page(HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "body":
            self.silent.clear()  # a head that is never closed
        if tag in SILENT:
            self.silent.append(tag)
        if tag not in INLINE:
            self.pieces.append("\n")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag not in INLINE:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.silent:
            del self.silent[self.silent.index(tag) :]
        if tag not in INLINE:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.pieces.append(data.replace("\n", " "))
