"""Decompress a file by the ending of its name, as a stream: gzip, bzip2, xz and Zstandard, of one or more members.

The file objects of Python and fsspec are not used: those of bzip2 and xz pass over a damaged second member, and that of
Zstandard over a frame that is cut off, so that a torn corpus would be a shorter one.

What a file is otherwise is judged by its first bytes: archives, compressed and binary files are named, never taken for
text. An ending says what a file should be; people rename, servers unpack, and archives are compressed. A file that is
something else is refused with what it is and what makes text of it.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from checkpoints.redact import redact
from modularforge.data.patterns import file_part
from modularforge.errors import DataError, one_line

# Fed to a decompressor at once: repetitive text grows a thousandfold.
COMPRESSED_BYTES = 1 << 13
# `zstd --long=31` is the longest there is; the window is memory that such a file takes while it is read.
ZSTD_WINDOW = 1 << 31
COPY_AGAIN = "copy or download it again"
HEAD_BYTES = 4096
# UTF-16 of European text is half NULs; a stray NUL in a crawl is one in thousands.
NUL_SHARE = 0.1
WESTERN_SHARE = 0.3
ARCHIVE = "unpack it and name its files"
GZIP = "gzip data"
MAGIC = [
    (rb"\x1f\x8b", GZIP, "give it a name that ends in .gz"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "Zstandard data", "give it a name that ends in .zst"),
    (rb"\xfd7zXZ\0", "xz data", "give it a name that ends in .xz"),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "bzip2 data", "give it a name that ends in .bz2"),
    (rb"\x04\x22\x4d\x18", "LZ4 data", "unpack it with lz4 -d"),
    (rb"\xff\x06\0\0sNaPpY", "Snappy data", "unpack it"),
    (rb"\x1f[\x9d\xa0]|\x5d\0\0\x80\0", "compressed data", "unpack it"),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (or a document or array file made of one)", ARCHIVE),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", ARCHIVE),
    (rb"Rar!\x1a\x07", "a rar archive", ARCHIVE),
    (rb"(?s:.{257})ustar(\0|  \0)", "a tar archive", ARCHIVE),
    (rb"!<arch>\n", "an ar archive", ARCHIVE),
    (rb"PAR1\x15", "a Parquet file", "give it a name that ends in .parquet, or set format: parquet"),
    (rb"ARROW1\0|FEA1\0", "an Arrow file", "save it as Parquet"),
    (rb"Obj\x01", "an Avro file", "save it as Parquet or JSONL"),
    (rb"\x93NUMPY", "a NumPy array", "give it a name that ends in .npy, and the source a tokenizer"),
    (rb"MMIDIDX\0", "an index of Megatron token files", "give it a name that ends in .idx, and the source a tokenizer"),
    (rb"\x89HDF|SQLite format 3\0|ORC[\0-\x08]", "a file of tables or arrays", "save it as Parquet or JSONL"),
    (rb"GGUF[\1-\x09]\0\0\0", "a GGUF model", ""),
    (rb"\x80[\2-\5]", "a Python pickle", "save what it holds as JSONL or Parquet"),
    (rb"%PDF-", "a PDF document", "extract its text"),
    (rb"\xd0\xcf\x11\xe0", "an old Office document", "save it as text"),
    (rb"\x7fELF|MZ(?s:.)\0|\xca\xfe\xba\xbe|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe", "a program", ""),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a(?s:.{4})[\0\x80-\xff]|RIFF(?s:.{4})(WAVE|WEBP|AVI )", "an image or a sound", ""),
    (rb"\0\x05\x16[\0\x07]", "a side file of macOS (AppleDouble)", ""),
]  # fmt: skip
KINDS = [(re.compile(pattern), name, advice) for pattern, name, advice in MAGIC]
MARKS = [
    (b"\xff\xfe\0\0", "UTF-32LE"), (b"\0\0\xfe\xff", "UTF-32BE"), (b"\xff\xfe", "UTF-16LE"), (b"\xfe\xff", "UTF-16BE"),
]  # fmt: skip


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
    decompressor, started, line = new_decompressor(), False, 1
    for chunk in chunks:
        while chunk := chunk if started else chunk.lstrip(b"\0"):
            try:
                plain = decompressor.decompress(chunk)
            except Exception as error:  # each library has an error class of its own
                raise _damaged(url, *_what_it_is(url, chunk, line if started else 0, error)) from error
            line += plain.count(b"\n")
            yield plain
            started, chunk = not decompressor.eof, decompressor.unused_data if decompressor.eof else b""
            decompressor = decompressor if started else new_decompressor()
    if started:
        raise _damaged(url, f"ends in the middle, in line {line}")


def _what_it_is(url: str, chunk: bytes, line: int, error: Exception) -> tuple[str, str]:
    """What the file is instead, and what to do; `line` is the one that it was at, 0 before the first."""
    if line:
        return f"is damaged in line {line} or soon behind it ({one_line(error)})", COPY_AGAIN
    if (found := describe(chunk)) and found[1] != f"give it a name that ends in {compression_of(url)}":
        return f"is {found[0]}", found[1] or "leave it out of the settings"
    cure = f"{COPY_AGAIN}, or take {compression_of(url)} from its name if it is plain"
    return f"is damaged or not compressed ({one_line(error)})", cure


def _damaged(url: str, what: str, cure: str = COPY_AGAIN) -> DataError:
    return DataError(f"{redact(url)} must be a whole {compression_of(url)} file, but {what}; {cure}")


def require_text(name: str, head: bytes, within: str = "") -> None:
    """Raise DataError if `head`, the first bytes of a file, is not the beginning of text.

    `within` is the compression that the bytes came out of.
    """
    if found := describe(head):
        inside = f"holds {found[0]} in its {within}" if within else f"is {found[0]}"
        advice = f"decompress it from {within}" if within and "a name that ends" in found[1] else found[1]
        cure = f"{advice}, or " if advice else ""
        raise DataError(f"{name} must be UTF-8 text, but {inside}; {cure}leave it out of the settings")


def describe(head: bytes) -> tuple[str, str] | None:
    """What the first bytes of a file that is no UTF-8 text say it is, and what to do with it; None for text."""
    for pattern, name, advice in KINDS:
        if pattern.match(head):
            inside = _within_gzip(head) if name == GZIP else None
            return (f"{inside[0]} in gzip data", inside[1]) if inside else (name, advice)
    if encoding := _wide_encoding(head):
        return f"text in {encoding}", f"convert it (iconv -f {encoding} -t UTF-8)"
    if head.count(0) > len(head) * NUL_SHARE:
        return f"binary data ({head.count(0)} of its first {len(head)} bytes are NUL)", "save its text as UTF-8"
    return None


def _within_gzip(head: bytes) -> tuple[str, str] | None:
    """What lies compressed in it, where that is no text either, as in .tgz."""
    try:
        return describe(zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES))
    except zlib.error:
        return None


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 as iconv calls it, by the mark, or by reading it: the wrong order gives no Western letters."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding.rstrip("LBE")  # with a mark, iconv finds the order itself and drops the mark
    if head.count(0) <= len(head) * NUL_SHARE:
        return None
    shares = {encoding: _western_share(head, encoding) for _, encoding in MARKS}
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] > WESTERN_SHARE else None


def _western_share(head: bytes, encoding: str) -> float:
    text = head[: len(head) // 4 * 4].decode(encoding, errors="replace")
    return sum(letter.isprintable() or letter.isspace() for letter in text if letter < "\u0250") / max(1, len(text))
