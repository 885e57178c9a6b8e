"""Small texts within the keys of an object store, so that a listing, a thousand keys for a request, tells them.

A text is compressed (with its checksum) into letters that any key may have, and cut into parts of which each could be
the name of a file: some servers keep their objects as files.
"""

from __future__ import annotations

import base64
import zlib

MOST_KEY_BYTES = 1000  # S3 takes 1,024
PART_LETTERS = 200
MOST_BYTES = 1 << 16  # of a text; what claims to be larger is none of ours


def packed(content: bytes) -> str:
    """A text as the parts of a key."""
    text = base64.urlsafe_b64encode(zlib.compress(content, 9)).decode().rstrip("=")
    return "/".join(text[start : start + PART_LETTERS] for start in range(0, len(text), PART_LETTERS))


def unpacked(key: str) -> bytes:
    """The text that `packed` made a key of; raises ValueError for any other."""
    letters = key.replace("/", "")
    inflate = zlib.decompressobj()
    try:
        content = base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=b"-_", validate=True)
        found = inflate.decompress(content, MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"{key!r:.60} holds no text: {error}") from error
    if not inflate.eof:
        raise ValueError(f"{key!r:.60} holds no whole text")
    return found


def fits(url: str) -> bool:
    """Whether a store takes an object of this URL."""
    return len(url.split("://", 1)[-1].encode()) <= MOST_KEY_BYTES
