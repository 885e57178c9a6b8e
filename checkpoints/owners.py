"""Who works on an unfinished file or folder: a lock that ends with its process, and a note on whose it is.

The lock decides, but not every file system carries it to other machines. So the note in a folder names the machine
whose lock it is; what has another machine's note, or none, is left alone until it is old (garbage.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from checkpoints.parsing import parse_object
from checkpoints.urls import OWNER_NAME

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Owner:
    """The machine on which a folder is written, and whether a later writer goes on with what it leaves."""

    machine: str
    resumes: bool


@cache
def this_machine() -> str:
    """A name that no other machine has, nor this one after a restart; containers of one machine share it."""
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return socket.gethostname()


@contextmanager
def claimed(path: Path) -> Iterator[bool | None]:
    """Whether this process now owns a file or folder: False when another does, None where nobody can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # gone, or a link
        yield None
        return
    try:
        yield _take(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, resumes: bool = False) -> Iterator[bool]:
    """Whether this process now owns the scratch folder; the lock ends with the process, however it ends."""
    with claimed(folder) as is_mine:
        if is_mine:
            with suppress(OSError):  # a full disk, which the writer will meet itself
                (folder / OWNER_NAME).write_text(json.dumps(asdict(Owner(this_machine(), resumes))))
        yield bool(is_mine)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread of this machine is in here with the same folder, which is made.

    Where the file system knows no locks, nobody waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def has_writer(path: Path) -> bool:
    """Whether a living process owns a scratch folder; where the file system knows no locks, nobody can tell."""
    with claimed(path) as is_mine:
        return is_mine is False


def owner_of(folder: Path) -> Owner | None:
    """What a folder's note says; None when there is none that can be read."""
    try:
        values = parse_object((folder / OWNER_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    machine, resumes = values.get("machine"), values.get("resumes")
    return Owner(machine, resumes) if isinstance(machine, str) and isinstance(resumes, bool) else None


def _take(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
