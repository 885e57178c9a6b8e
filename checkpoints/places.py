"""URLs as words: joining, local or not, and the names that unfinished work carries. Touches no storage."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import StoreError

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".journal.json"  # finished files of an unfinished artifact
OWNER_NAME = ".owner.json"  # who writes an unfinished artifact
OWN_NAMES = (MANIFEST_NAME, JOURNAL_NAME, OWNER_NAME)  # of the store itself, beside an artifact's files
ATTEMPT = re.compile(r"attempt-[0-9a-f]{12}")
UPLOAD_SCRATCH = "modularforge-upload-"  # folders of writers to object stores, in the temporary folder
# In hidden names: on its way to be deleted; set aside because it is damaged.
DELETED, DAMAGED = "deleted", "damaged"
HIDDEN = re.compile(r"\..+\.attempt-[0-9a-f]{12}")


@dataclass(frozen=True)
class FileInfo:
    """A file that a listing found: where, how large, and when it was last written (seconds since 1970)."""

    url: str
    size: int
    modified: float


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
