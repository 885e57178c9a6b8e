"""Puts a folder in the place of another one, in one step where the system can, so that readers find one of them."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from checkpoints.places import hidden_name
from checkpoints.retry import logger

AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # an old kernel, or a network file system


def exchange(new: Path, old: Path) -> None:
    """Give each of two folders beside each other the other's name."""
    if _exchanged(new, old):
        return
    logger.warning("%s is replaced in two steps, because this file system has no exchange: wait before you read", old)
    aside = old.with_name(hidden_name(old.name))
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _exchanged(new: Path, old: Path) -> bool:
    """Whether the system did it; raises OSError when it can, and refuses."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(old))
