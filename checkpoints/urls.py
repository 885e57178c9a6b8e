"""URLs and names as words: joining, local or not, and the names that unfinished work carries. Touches no storage.

Names that somebody else wrote are turned into relative paths that stay where they are joined. Manifests, listings,
indices of weight files, archives and event files may come from a bucket that others can write: every name in them goes
through `checked_path` before it is joined to a folder or a URL; nothing else decides what is safe.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import StoreError

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".journal.json"  # finished files of an unfinished artifact
OWNER_NAME = ".owner.json"  # who writes an unfinished artifact
LABEL = ".label"  # what a listing tells of an artifact on an object store
OWN_NAMES = (MANIFEST_NAME, JOURNAL_NAME, OWNER_NAME)  # of the store itself, beside an artifact's files
ATTEMPT = re.compile(r"attempt-[0-9a-f]{12}")
UPLOAD_SCRATCH = "modularforge-upload-"  # folders of writers to object stores, in the temporary folder
# In hidden names: on its way to be deleted; set aside because it is damaged.
DELETED, DAMAGED = "deleted", "damaged"
HIDDEN = re.compile(r"\..+\.attempt-[0-9a-f]{12}")
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


@dataclass(frozen=True)
class FileInfo:
    """A file that a listing found: where, how large, and when it was last written (seconds since 1970).

    `tag` is the ETag of an object, of stores that tell it: another one for other bytes.
    """

    url: str
    size: int
    modified: float
    tag: str = ""


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL with single slashes; empty parts are skipped."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts if part)])


def is_local(url: str) -> bool:
    """Whether the URL is a folder of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The folder behind a local URL; `~x` that exists, or is written `./~x`, is a name and nobody's home."""
    name = url.removeprefix("file://")
    path = Path(name)
    if str(path).startswith("~") and (not name.startswith("~") or (path.parts[0] != "~" and os.path.lexists(path))):
        return path.absolute()
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise StoreError(
            f"{path} must begin with a known home folder, but {path.parts[0]} is none; write it out"
        ) from error


def relative(url: str, root: str) -> str:
    """The part of a URL below a root URL."""
    if is_local(root):
        below = local_path(url).relative_to(local_path(root)).as_posix()
        return "" if below == "." else below
    return url.removeprefix(root.rstrip("/")).strip("/")


def new_attempt() -> str:
    """A name that no other writer has: the folder of one writer's files within an artifact."""
    return f"attempt-{os.urandom(6).hex()}"


def hidden_name(name: str) -> str:
    """A hidden name beside a file or folder for unfinished work; readers skip it and `gc` removes old ones."""
    return f".{name}.{new_attempt()}"


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
