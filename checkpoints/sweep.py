"""Removes what killed processes left in a run, when a stage has finished: only what is nobody's.

A hidden file or folder is nobody's when nothing in it was written since this process started, no living process holds
its lock, and either its note names this machine (so that the lock decides) or it is old. What a later writer would go
on with stays until it is old or its artifact is finished. Object stores know no locks, so there age alone decides.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from checkpoints import paths
from checkpoints.errors import StoreError
from checkpoints.garbage import delete_garbage, find_garbage
from checkpoints.owners import claimed, owner_of, this_machine
from checkpoints.places import DAMAGED, DELETED, HIDDEN, MANIFEST_NAME, OWNER_NAME, UPLOAD_SCRATCH
from checkpoints.retry import logger

STARTED = time.time()
FILE_SECONDS = 3600.0  # a living process writes to a file until it is finished
FOLDER_SECONDS = 24 * 3600.0  # the longest that a folder of another machine is not written to
OBJECT_SECONDS = 7 * 24 * 3600.0  # longer than any single upload


def sweep(root: str) -> list[str]:
    """Remove what is nobody's below the URL of a run, and return it; a store that refuses is only logged."""
    try:
        taken = _sweep_folder(paths.local_path(root)) if paths.is_local(root) else _sweep_objects(root)
    except (StoreError, OSError) as error:
        logger.warning("what killed processes left in %s stays: %s", root, error)
        return []
    for place in taken:
        logger.info("removed %s, which a killed process had left", place)
    return taken


def sweep_beside(folder: Path) -> None:
    """The same for what earlier writers of one artifact left beside it, wherever it lies."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if HIDDEN.fullmatch(path.name) and f".{DAMAGED}." not in path.name and _take_away(path):
            logger.info("removed %s, which a killed process had left", path)


def _sweep_folder(root: Path) -> list[str]:
    return [str(path) for path in _unfinished(root) if _take_away(path)]


def _sweep_objects(root: str) -> list[str]:
    garbage = find_garbage(root, OBJECT_SECONDS)
    delete_garbage(garbage)
    scratch = Path(tempfile.gettempdir()).glob(f"{UPLOAD_SCRATCH}*")
    return [*(item.url for item in garbage), *(str(folder) for folder in scratch if _take_away(folder))]


def _unfinished(root: Path) -> Iterator[Path]:
    """Hidden files and folders of the store's own making, but for checkpoints that were set aside to be looked at."""
    for folder, folders, names in os.walk(root):
        hidden = [name for name in (*folders, *names) if HIDDEN.fullmatch(name)]
        folders[:] = [name for name in folders if name not in hidden]
        yield from (Path(folder, name) for name in hidden if f".{DAMAGED}." not in name)


def _take_away(path: Path) -> bool:
    """Remove a file or folder if it is nobody's; its lock is held meanwhile, so that nobody begins to go on with it."""
    with claimed(path) as is_mine:
        try:
            if is_mine is False or path.is_symlink() or not _is_nobodys(path, has_lock=bool(is_mine)):
                return False
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        except OSError:  # gone meanwhile, or another user's
            return False
        return not path.exists()


def _is_nobodys(path: Path, has_lock: bool) -> bool:
    modified = _last_write(path)
    if modified >= STARTED:
        return False
    age = time.time() - modified
    if not path.is_dir():
        return age > FILE_SECONDS
    return f".{DELETED}." in path.name or age > FOLDER_SECONDS or (has_lock and _is_of_a_dead_process(path))


def _is_of_a_dead_process(folder: Path) -> bool:
    """Whether a folder whose lock is free was written on this machine, and nobody will go on with it.

    An empty one is of a process that was killed before it could say whose it is.
    """
    owner = owner_of(folder)
    if owner is None:
        return {path.name for path in folder.iterdir()} <= {OWNER_NAME}
    if owner.machine != this_machine():
        return False
    return not owner.resumes or (folder.with_name(folder.name[1:].rpartition(".")[0]) / MANIFEST_NAME).exists()


def _last_write(path: Path) -> float:
    below = (os.path.join(folder, name) for folder, folders, names in os.walk(path) for name in (*folders, *names))
    return max(os.lstat(place).st_mtime for place in (str(path), *below))
