"""Names that somebody else wrote, turned into relative paths that stay where they are joined.

Manifests, listings, indices of weight files, archives and event files may come from a bucket that others can write.
Every name in them goes through `checked_path` before it is joined to a folder or a URL; nothing else decides what is
safe.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any

MAX_PART_BYTES = 255  # the limit of ext4, XFS, APFS and NTFS; a longer part could be written nowhere
MAX_PATH_BYTES = 1024  # the limit of an S3 key
# Devices on Windows, whatever their ending; a folder that was pulled on Linux may be copied there.
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
MAX_SLUG = 100
DRIVE = re.compile(r"[A-Za-z]:")
# Control characters, line and paragraph separators, half surrogate pairs: they end a line, hide what follows, or cannot
# be encoded.
REFUSED_CATEGORIES = frozenset({"Cc", "Zl", "Zp", "Cs"})


class UnsafeNameError(ValueError):
    """A name that would lead out of the folder it belongs to, or that no file can have; readers say in which file."""


def checked_path(name: Any) -> str:
    """The name itself if it is a relative path of plain parts (``a/b.txt``); raises UnsafeNameError."""
    if not isinstance(name, str):
        raise UnsafeNameError(f"a file name must be text, but is {name!r:.80}")
    parts = [checked_part(part) for part in name.split("/")]
    if len(name.encode()) > MAX_PATH_BYTES:
        raise UnsafeNameError(f"a file name must have at most {MAX_PATH_BYTES} bytes, but {name[:40]!r}… is longer")
    return "/".join(parts)


def checked_part(part: Any) -> str:
    """One part of a path, as the name of a file or folder; raises UnsafeNameError."""
    if not isinstance(part, str):
        raise UnsafeNameError(f"a file name must be text, but is {part!r:.80}")
    if reason := _why_not(part):
        raise UnsafeNameError(f"{part!r:.80} {reason}, so it is not a file name within a folder")
    return part


def safe_part(text: str) -> str:
    """A file name made from any text: plain letters, digits and `-._` stay, and what had others ends in a hash."""
    if len(text) <= MAX_SLUG and PLAIN.fullmatch(text) and not _why_not(text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', text)[:MAX_SLUG].strip('-')}-{digest}".lstrip("-")


def has_control_characters(text: str) -> bool:
    """Whether text holds what ends a line or cannot be shown in one."""
    return any(unicodedata.category(character) in REFUSED_CATEGORIES for character in text)


def _why_not(part: str) -> str:
    if not part:
        return "is empty"
    if part in (".", ".."):
        return "means another folder"
    if has_control_characters(part):
        return "has control characters"
    if "/" in part or "\\" in part or DRIVE.match(part):
        return "is a path of its own"
    if part[-1] in ". " or RESERVED.fullmatch(part):
        return "is no name on every system"  # Windows drops a dot or blank at the end: two names, one file
    return "is too long" if len(part.encode()) > MAX_PART_BYTES else ""
