"""The store on any other fsspec file system: ``memory://`` for tests, ``gs://``, ``az://`` and the rest."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable
from typing import Any

from checkpoints.retry import call
from checkpoints.urls import FileInfo

PIECE_BYTES = 4 << 20  # of one request
_CREATING = threading.Lock()  # fsspec's memory file system checks and writes in two steps


class ObjectStore:
    """Files of an fsspec file system; all methods take its URLs."""

    def __init__(self, filesystem: Any, protocol: str) -> None:
        self._files = filesystem
        self._protocol = protocol

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; raises FileNotFoundError."""
        content: bytes = call("read", url, lambda: self._files.cat_file(url, start=start or None, end=end))
        return content

    def read_pieces(self, url: str, start: int = 0, end: int | None = None) -> list[bytes]:
        """The same bytes as `read`, here in one piece."""
        return [self.read(url, start, end)]

    def read_into(self, url: str, start: int, view: memoryview) -> int:
        """Fill a buffer with the bytes behind `start`; returns how many there are, fewer at the file's end."""
        content = self.read(url, start, start + len(view))
        view[: len(content)] = content
        return len(content)

    def read_through(self, url: str, start: int, end: int, take: Callable[[memoryview], bool]) -> None:
        """Hand bytes [start, end) over in pieces; ends early where `take` says False, and where the file ends."""
        for first in range(start, end, PIECE_BYTES):
            content = self.read(url, first, min(first + PIECE_BYTES, end))
            if not take(memoryview(content)) or len(content) < min(PIECE_BYTES, end - first):
                return

    def size(self, url: str) -> int:
        """Size of a file; raises FileNotFoundError."""
        info = call("look at", url, lambda: self._files.info(url))
        if info["type"] != "file":
            raise FileNotFoundError(url)
        return int(info["size"])

    def create(self, url: str, content: bytes) -> str:
        """Write a file that must not exist yet; raises FileExistsError."""
        with _CREATING:
            call("create", url, lambda: self._files.pipe_file(url, content, mode="create"))
        return ""  # known of S3 alone

    def replace(self, url: str, content: bytes) -> None:
        """Write a file, in place of an older one if there is one."""
        call("write", url, lambda: self._files.pipe_file(url, content))

    def upload(self, url: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file from its parts; what an error leaves is under a key that no manifest names."""
        with call("write", url, lambda: self._files.open(url, "wb")) as file:
            for part in parts:
                call("write", url, lambda part=part: file.write(part))  # type: ignore[misc]

    def copy_inside(self, source: str, target: str, _size: int | None = None) -> bool:
        """Let the store copy a file; what that costs depends on the file system."""
        call("copy", target, lambda: self._files.cp_file(source, target))
        return True

    def list_names(self, url: str) -> list[str]:
        """Names directly below a prefix, sorted; empty when there are none."""
        try:
            entries = call("list", url, lambda: self._files.ls(url, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def walk(self, url: str) -> list[FileInfo]:
        """All files below a prefix."""
        found = call("list", url, lambda: self._files.find(url, detail=True))
        return [FileInfo(self._url(path), int(info["size"]), _modified(info)) for path, info in sorted(found.items())]

    def delete(self, urls: Iterable[str]) -> None:
        """Delete files; those that are gone already are skipped."""
        for url in urls:
            try:
                call("delete", url, lambda url=url: self._files.rm_file(url))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    def _url(self, path: str) -> str:
        return f"{self._protocol}://{path.lstrip('/')}"


def _modified(info: dict[str, Any]) -> float:
    """Time of the last write; file systems name it differently, and unknown counts as now so that gc leaves it."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if isinstance(value := info.get(name), datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return datetime.datetime.now().timestamp()
