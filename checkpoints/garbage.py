"""Finds and deletes what unfinished work left behind, and nothing else.

Only names that the store itself makes for unfinished work are touched: hidden scratch folders, attempts that no
manifest names, multipart uploads, manifests that were set aside, and scratch folders of this machine. Everything is
left alone until it is older than a grace time, which must be longer than the longest single write, and a folder also
while the process that locked it lives.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import paths
from checkpoints.artifact import find_artifact
from checkpoints.manifest import MANIFEST_NAME
from checkpoints.owners import has_writer
from checkpoints.places import ATTEMPT, HIDDEN, UPLOAD_SCRATCH, FileInfo
from checkpoints.s3 import S3Store

DEFAULT_GRACE_SECONDS = 24 * 3600.0


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
    found = [*_unfinished_folders(url), *_unfinished_uploads(url), *_scratch_folders(url)]
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


def _unfinished_folders(url: str) -> Iterator[Garbage]:
    groups: dict[str, list[FileInfo]] = defaultdict(list)
    for info in [*paths.walk(url), *_empty_folders(url)]:
        if unfinished := _unfinished_part(info.url, url):
            groups[unfinished].append(info)
    for folder, files in groups.items():
        if not _is_committed(folder):
            size, modified = sum(info.size for info in files), max(info.modified for info in files)
            yield Garbage(folder, "unfinished", size, modified, [info.url for info in files])


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
