"""The store on a folder: every write goes beside its target, to the disk, and then into place in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoints.durable import DurableFile
from checkpoints.places import FileInfo, hidden_name, local_path
from checkpoints.retry import call

# Another disk, a file system without hard links, or one that forbids more of them.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class FolderStore:
    """Files below local folders; all methods take plain paths or ``file://`` URLs."""

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; raises FileNotFoundError."""
        return call("read", url, lambda: _read(local_path(url), start, end))

    def read_pieces(self, url: str, start: int = 0, end: int | None = None) -> list[bytes]:
        """The same bytes as `read`, here in one piece."""
        return [self.read(url, start, end)]

    def size(self, url: str) -> int:
        """Size of a file; raises FileNotFoundError, also for a folder."""
        return call("look at", url, lambda: _file_size(local_path(url)))

    def create(self, url: str, content: bytes) -> None:
        """Write a file that must not exist yet; raises FileExistsError."""
        call("create", url, lambda: write_atomically(local_path(url), [content], replace=False))

    def replace(self, url: str, content: bytes) -> None:
        """Write a file, in place of an older one if there is one."""
        call("write", url, lambda: write_atomically(local_path(url), [content], replace=True))

    def upload(self, url: str, parts: Iterable[bytes]) -> None:
        """Write a file from its parts."""
        call("write", url, lambda: write_atomically(local_path(url), parts, replace=True))

    def copy_inside(self, source: str, target: str) -> bool:
        """Hard-link a file, in place of an older one; False where the file system cannot."""
        path = local_path(target)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(local_path(source), path)
        except OSError as error:
            if error.errno in NO_LINKS:
                return False
            raise
        return True

    def list_names(self, url: str) -> list[str]:
        """Names in a folder, sorted; empty when there is no folder."""
        try:
            return sorted(call("list", url, lambda: os.listdir(local_path(url))))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, url: str) -> list[FileInfo]:
        """All files below a folder."""
        return call("list", url, lambda: sorted(_walk(local_path(url)), key=lambda info: info.url))

    def delete(self, urls: Iterable[str]) -> None:
        """Delete files; those that are gone already are skipped."""
        for url in urls:
            call("delete", url, lambda url=url: local_path(url).unlink(missing_ok=True))  # type: ignore[misc]

    def delete_folder(self, url: str) -> None:
        """Delete a file or a folder; a folder is renamed to a hidden name first, so it vanishes in one step."""
        call("delete", url, lambda: _delete_tree(local_path(url)))


def write_atomically(path: Path, parts: Iterable[bytes], *, replace: bool) -> None:
    """Write beside the target, flush to disk, then link or rename: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(hidden_name(path.name))
    try:
        with open(scratch, "wb") as file, DurableFile(file) as target:
            for part in parts:
                target.write(part)
        if replace:
            os.replace(scratch, path)
        else:
            os.link(scratch, path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, start: int, end: int | None) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


def _file_size(path: Path) -> int:
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder")
    return path.stat().st_size


def _walk(root: Path) -> Iterator[FileInfo]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # deleted while we walk
                status = path.stat()
                yield FileInfo(str(path), status.st_size, status.st_mtime)


def _delete_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        trash = path.with_name(hidden_name(path.name))
        try:
            os.rename(path, trash)
        except FileNotFoundError:  # another process was faster
            return
        sync_folder(path.parent)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
