"""The store on a folder: every write goes beside its target, to the disk, and then into place in one step.

Files are written to the disk while their bytes still come, so that the flush at the end has little left to do; a folder
takes the place of another one in one step where the system can, so that readers find one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from checkpoints.errors import CorruptArtifactError, DataError
from checkpoints.owners import claimed
from checkpoints.retry import call, explain, is_transient, logger
from checkpoints.urls import DELETED, FileInfo, hidden_name, local_path

# Another disk, a file system without hard links, or one that forbids more of them.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Larger writes make the kernel take blocks of 2 MiB for its cache, which in virtual machines that hand free memory back
# to their host have to be fetched from there first: 3 s instead of 0.3 s per GiB (measured).
PIECE_BYTES = 256 << 10
FLUSH_BYTES = 8 << 20
Take = Callable[[memoryview], bool]
BLOCK_BYTES = 1 << 20  # stays in the processor's cache while it is hashed
# Another disk, an old kernel, or a file system or a sandbox that does not copy; then the bytes pass through us.
NO_COPIES = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # an old kernel, or a network file system


class FolderStore:
    """Files below local folders; all methods take plain paths or ``file://`` URLs."""

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; raises FileNotFoundError."""
        return call("read", url, lambda: _read(local_path(url), start, end))

    def read_pieces(self, url: str, start: int = 0, end: int | None = None) -> list[bytes]:
        """The same bytes as `read`, here in one piece."""
        return [self.read(url, start, end)]

    def read_into(self, url: str, start: int, view: memoryview) -> int:
        """Fill a buffer with the bytes behind `start`; returns how many there are, fewer at the file's end."""
        return call("read", url, lambda: _read_into(local_path(url), start, view))

    def read_through(self, url: str, start: int, end: int, take: Take) -> None:
        """Hand bytes [start, end) over in pieces that are there until `take` returns.

        Ends early where `take` says False, and at the file's end. After a fault it goes on behind what has come.
        """
        buffer, at = memoryview(bytearray(PIECE_BYTES)), start

        def go_on() -> None:
            nonlocal at
            check_regular(local_path(url))
            with open(local_path(url), "rb", buffering=0) as file:
                file.seek(at)
                while at < end and (size := file.readinto(buffer[: end - at])):
                    at += size
                    if not take(buffer[:size]):
                        return

        call("read", url, go_on)

    def size(self, url: str) -> int:
        """Size of a file; raises FileNotFoundError, also for a folder."""
        return call("look at", url, lambda: _file_size(local_path(url)))

    def create(self, url: str, content: bytes) -> str:
        """Write a file that must not exist yet; raises FileExistsError."""
        call("create", url, lambda: write_atomically(local_path(url), [content], replace=False))
        return ""  # known of S3 alone

    def replace(self, url: str, content: bytes) -> None:
        """Write a file, in place of an older one if there is one."""
        call("write", url, lambda: write_atomically(local_path(url), [content], replace=True))

    def upload(self, url: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file from its parts; tried once, since parts that have passed do not come again."""

        def write() -> None:
            try:
                write_atomically(local_path(url), parts, replace=True)
            except OSError as error:
                if is_transient(error):
                    raise explain(error, "write", url) from error
                raise

        call("write", url, write)

    def copy_inside(self, source: str, target: str, _size: int | None = None) -> bool:
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


def write_atomically(path: Path, parts: Iterable[bytes | memoryview], *, replace: bool) -> None:
    """Write beside the target, flush to disk, then link or rename: a reader sees all of it or nothing."""
    with written_beside(path, replace=replace) as scratch, open(scratch, "r+b") as file, DurableFile(file) as target:
        for part in parts:
            target.write(part)


@contextlib.contextmanager
def written_beside(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """An empty file beside a place, which takes it at the end of the body; whoever writes it flushes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(hidden_name(path.name))
    try:
        open(scratch, "xb").close()
        with claimed(scratch):
            yield scratch
            if replace:
                os.replace(scratch, path)
            else:
                os.link(scratch, path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def check_regular(path: Path) -> os.stat_result:
    """The status of a file or folder; raises CorruptArtifactError for what would block or act when it is opened."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CorruptArtifactError(f"{path} must be a file, but is a link to itself; put the file there") from error
    if kind := SPECIAL.get(stat.S_IFMT(status.st_mode)):
        raise CorruptArtifactError(f"{path} must be a file, but is {kind}; put the file itself there")
    return status


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for what comes behind its end, in a folder that is made; a pipe or a device is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        check_regular(path)
    return open(path, "ab")


def leads_out(path: Path, root: Path) -> bool:
    """Whether a link on the way from a folder to what lies in it leads out of that folder."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def check_within(path: Path, root: Path) -> None:
    """Raise CorruptArtifactError for a link that leads out of the folder; the folder itself may be a link."""
    if leads_out(path, root):
        raise CorruptArtifactError(
            f"{path} must lie in {root}, but is or passes a link to {os.path.realpath(path)}; put the file itself there"
        )


def linked_folders(root: Path) -> list[Path]:
    """Links to folders below a folder, sorted; `walk` does not follow them."""
    return sorted(
        path for folder, names, _ in os.walk(root) for name in names if (path := Path(folder, name)).is_symlink()
    )


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
    check_regular(path)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read() if end is None else file.read(end - start)


def _read_into(path: Path, start: int, view: memoryview) -> int:
    check_regular(path)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while more := file.readinto(view[done:]):
            done += more
    return done


def _file_size(path: Path) -> int:
    status = check_regular(path)
    if stat.S_ISDIR(status.st_mode):
        raise FileNotFoundError(f"{path} is a folder")
    return status.st_size


def _walk(root: Path) -> Iterator[FileInfo]:
    """Links are followed within the folder alone; of one that leads out, only the link itself is looked at."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # deleted while we walk
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode) and not leads_out(path, root):
                    with contextlib.suppress(OSError):  # it leads nowhere, or in a circle
                        status = path.stat()
                yield FileInfo(str(path), status.st_size, status.st_mtime)


def _delete_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        trash = path.with_name(hidden_name(f"{path.name}.{DELETED}"))
        try:
            os.rename(path, trash)
        except FileNotFoundError:  # another process was faster
            return
        sync_folder(path.parent)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class OpenFile:
    """A local file that is read from any place and by any thread; closed when nobody has it any more."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.descriptor = os.open(local_path(url), os.O_RDONLY)
        self.copies = hasattr(os, "copy_file_range")
        """Whether the kernel has not refused to copy from it yet."""

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length); raises DataError when the file ends before."""
        content = os.pread(self.descriptor, length, start)
        while len(content) < length:
            more = os.pread(self.descriptor, length - len(content), start + len(content))
            if not more:
                missing = length - len(content)
                raise DataError(
                    f"{self.url} must be a whole weight file, but ends {missing} bytes early; make it again"
                )
            content += more
        return content

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class FileSpan:
    """Bytes [start, start + length) of an open file as something to write; read by those alone who look at them."""

    def __init__(self, file: OpenFile, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length

    def blocks(self, behind: int = 0) -> Iterator[bytes]:
        """The bytes behind the first ones, in blocks of 1 MiB; raises DataError when the file ends before."""
        for first in range(behind, self.length, BLOCK_BYTES):
            yield self.file.read(self.start + first, min(BLOCK_BYTES, self.length - first))

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        return self.file.read(self.start, self.length) == other

    __hash__ = None  # type: ignore[assignment]


class DurableFile:
    """Writes where an open binary file stands; at the end of a `with` without error all is on the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._waiting_bytes = 0

    def write(self, chunk: bytes | memoryview | FileSpan) -> None:
        """Write all of a chunk, and let the disk begin with every 8 MiB.

        Bytes of another file are copied by the kernel where it can: within it, by a server, or as a second name of the
        same blocks.
        """
        for block in chunk.blocks(self._copied(chunk)) if isinstance(chunk, FileSpan) else [chunk]:
            view = memoryview(block)
            while len(view):
                done = os.write(self._descriptor, view[:PIECE_BYTES])
                self._waiting_bytes += done
                view = view[done:]
        if self._waiting_bytes >= FLUSH_BYTES:
            end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            start_flush(self._descriptor, end - self._waiting_bytes, self._waiting_bytes)
            self._waiting_bytes = 0

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            os.fsync(self._descriptor)

    def _copied(self, span: FileSpan) -> int:
        """How many bytes of a span the kernel has copied: fewer than all where it cannot."""
        done = 0
        while span.file.copies and done < len(span):
            source, left = span.file.descriptor, len(span) - done
            try:
                more = os.copy_file_range(source, self._descriptor, left, span.start + done)
            except OSError as error:
                if error.errno not in NO_COPIES:
                    raise
                span.file.copies = False
            else:
                span.file.copies = more > 0  # some file systems copy nothing, and say no error
                done += more
        self._waiting_bytes += done
        return done


def start_flush(descriptor: int, start: int, size: int) -> None:
    """Let the disk begin with bytes just written: the advice starts that on Linux, and they stay cached meanwhile."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


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
