"""Finds and deletes what unfinished work left behind, and nothing else.

Only names that the store itself makes for unfinished work are touched: hidden scratch folders, attempts that no
manifest names, multipart uploads, manifests that were set aside, and scratch folders of this machine. Everything is
left alone until it is older than a grace time, which must be longer than the longest single write, and a folder also
while the process that locked it lives.

`find_garbage` and `delete_garbage` are for `gc`. `sweep` runs when a stage has finished, without a grace time, and so
takes less: a hidden file or folder is nobody's when nothing in it was written since this process started, no living
process holds its lock, and either its note names this machine (so that the lock decides) or it is old. What a later
writer would go on with stays until it is old or its artifact is finished. Object stores know no locks, so there age
alone decides.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import paths
from checkpoints.artifact import LOOKS_AT_ONCE, find_artifact
from checkpoints.errors import StoreError
from checkpoints.owners import claimed, has_writer, owner_of, this_machine
from checkpoints.parallel import in_order
from checkpoints.retry import logger
from checkpoints.s3 import S3Store
from checkpoints.urls import ATTEMPT, DAMAGED, DELETED, HIDDEN, MANIFEST_NAME, OWNER_NAME, UPLOAD_SCRATCH, FileInfo

DEFAULT_GRACE_SECONDS = 24 * 3600.0
STARTED = time.time()
FILE_SECONDS = 3600.0  # a living process writes to a file until it is finished
FOLDER_SECONDS = 24 * 3600.0  # the longest that a folder of another machine is not written to
OBJECT_SECONDS = 7 * 24 * 3600.0  # longer than any single upload


@dataclass(frozen=True)
class Garbage:
    """One thing to delete: a folder or prefix with its files, or a multipart upload."""

    url: str
    reason: str
    size: int
    modified: float
    files: list[str] = field(default_factory=list)
    upload_id: str = ""


def find_garbage(url: str, grace_seconds: float = DEFAULT_GRACE_SECONDS) -> list[Garbage]:
    """All garbage below a URL that nobody has written to for the grace time."""
    before = time.time() - grace_seconds
    found = [*_unfinished_folders(url, before), *_unfinished_uploads(url), *_scratch_folders(url)]
    old = (item for item in found if item.modified <= before and not _has_writer(item.url))
    return sorted(old, key=lambda item: item.url)


def delete_garbage(garbage: Iterable[Garbage]) -> None:
    """Delete what `find_garbage` found; an attempt that was committed in between is left."""
    for item in garbage:
        store = paths.store_of(item.url)
        if item.upload_id and isinstance(store, S3Store):
            store.abort_upload(item.url, item.upload_id)
        elif _has_writer(item.url):
            continue
        elif paths.is_local(item.url):
            paths.remove(item.url)
        elif not _is_committed(item.url):
            store.delete(item.files)


def _unfinished_folders(url: str, before: float) -> Iterator[Garbage]:
    """Those that nobody has written to since; only of these a manifest is asked, of ten thousand side by side."""
    groups: dict[str, list[FileInfo]] = defaultdict(list)
    for info in [*paths.walk(url), *_empty_folders(url)]:
        if unfinished := _unfinished_part(info.url, url):
            groups[unfinished].append(info)
    written = {folder: max(info.modified for info in files) for folder, files in groups.items()}
    old = [folder for folder, modified in written.items() if modified <= before]
    for folder, is_committed in zip(old, in_order(_is_committed, old, LOOKS_AT_ONCE), strict=True):
        if not is_committed:
            files = groups[folder]
            size = sum(info.size for info in files)
            yield Garbage(folder, "unfinished", size, written[folder], [info.url for info in files])


def _empty_folders(url: str) -> Iterator[FileInfo]:
    """Hidden folders in which nothing was written yet, as a listing of files does not show them."""
    for folder, folders, _ in os.walk(paths.local_path(url)) if paths.is_local(url) else ():
        for name in folders:
            if HIDDEN.fullmatch(name):
                with suppress(FileNotFoundError):  # its writer has just ended
                    path = os.path.join(folder, name)
                    yield FileInfo(os.path.join(path, "."), 0, os.stat(path).st_mtime)


def _unfinished_part(file_url: str, root: str) -> str:
    """The URL up to the part that marks unfinished work, or an empty string."""
    names = paths.relative(file_url, root).split("/")
    for position, name in enumerate(names):
        is_file = position == len(names) - 1
        in_objects = not paths.is_local(root) and ATTEMPT.fullmatch(name) and not is_file
        if in_objects or HIDDEN.fullmatch(name) or (is_file and name == f"damaged.{MANIFEST_NAME}"):
            return paths.join(root, *names[: position + 1])
    return ""


def _unfinished_uploads(url: str) -> Iterator[Garbage]:
    store = paths.store_of(url)
    if isinstance(store, S3Store):
        for info, upload_id in store.unfinished_uploads(url):
            yield Garbage(info.url, "unfinished upload", 0, info.modified, upload_id=upload_id)


def _scratch_folders(url: str) -> Iterator[Garbage]:
    """What this user's killed writers to object stores left in the temporary folder of this machine."""
    root = Path(tempfile.gettempdir())
    for folder in () if paths.is_local(url) else root.glob(f"{UPLOAD_SCRATCH}*"):
        with suppress(FileNotFoundError):  # its writer has just ended
            if folder.is_dir() and folder.stat().st_uid == os.getuid():
                files = paths.walk(str(folder))
                modified = max([folder.stat().st_mtime, *(info.modified for info in files)])
                yield Garbage(str(folder), "scratch of a killed writer", sum(info.size for info in files), modified)


def _has_writer(url: str) -> bool:
    """Whether the scratch folder belongs to a process of this machine (or of its file system's) that lives."""
    return paths.is_local(url) and has_writer(paths.local_path(url))


def _is_committed(url: str) -> bool:
    """Whether this is the attempt that its artifact's manifest names."""
    artifact_url, _, attempt = url.rpartition("/")
    if not ATTEMPT.fullmatch(attempt):
        return False
    artifact = find_artifact(artifact_url)
    return artifact is not None and artifact.manifest.files_in == attempt


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
