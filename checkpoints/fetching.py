"""Brings a file to the disk by several requests at once, each of which writes where its bytes belong.

Nothing waits in memory for its turn: bytes go from a small buffer, still in the processor's cache, into the file, and
are hashed from there, which is the system's cache, in order, as far as they have come without a gap. So large parts and
many requests cost no memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from checkpoints import paths
from checkpoints.errors import CorruptArtifactError
from checkpoints.folder import PIECE_BYTES, start_flush
from checkpoints.hashing import CHUNK_BYTES, FileEntry, FileHasher
from checkpoints.pace import Pace, reading_of
from checkpoints.streams import REMEDY, check_hash, check_size, missing

LEAST_PART_BYTES, LARGEST_PART_BYTES = 8 << 20, 64 << 20
STEP_BYTES = 4 << 20  # after which it is looked whether more can be hashed
LOCAL_READS = 2
# A gap is told from bytes by whole blocks of the file system, which are not larger than this but on a few clusters.
BLOCK_BYTES = 1 << 20

Report = Callable[[int], object]


def fetch_file(url: str, entry: FileEntry, path: Path, report: Report = lambda size: None) -> None:
    """Make `path` the file at `url`, flushed to the disk, behind what an interrupted call left of it.

    `report` is told how many bytes more are done. Raises CorruptArtifactError unless the bytes are those of the entry;
    what was left and turns out to be damaged is fetched again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.exists() and paths.check_regular(path).st_size > 0
    try:
        _fetch(url, entry, path, report)
    except CorruptArtifactError:
        if not begun:
            raise
        path.unlink()
        _fetch(url, entry, path, report)


def _fetch(url: str, entry: FileEntry, path: Path, report: Report) -> None:
    check_size(url, entry)
    hasher = FileHasher(url, entry.digest)  # by the name that tells a weight file, which a scratch file may not have
    with open(path, "r+b" if path.exists() else "x+b", buffering=0) as file:
        start = _begun(file.fileno(), entry.size)
        file.truncate(start)
        landing = _Landing(file.fileno(), start, entry.size)
        with hasher.in_background(entry.size) as update, _Crew(url, entry, landing):
            for chunk in _landed(file, landing, entry.size):
                update(chunk)
                report(len(chunk))
        os.fsync(file.fileno())
    check_hash(url, entry, hasher)


def _begun(descriptor: int, size: int) -> int:
    """How many bytes of a file's beginning an interrupted call has written; more than the file has cannot be ours.

    A call that was killed leaves gaps, which have no blocks on the disk. Where that cannot be told, the hash will.
    """
    end = os.fstat(descriptor).st_size
    if end and hasattr(os, "SEEK_HOLE"):
        with suppress(OSError):
            gap = os.lseek(descriptor, 0, os.SEEK_HOLE)
            end = gap if gap >= end else max(gap - BLOCK_BYTES, 0)
    return min(end, size)


def _landed(file: BinaryIO, landing: _Landing, size: int) -> Iterator[bytes]:
    """A file's bytes in order, as they come; by pread, as a page that cannot be read ends a process that mapped it."""
    done = came = 0
    while done < size:
        came = landing.wait_beyond(done) if came <= done else came
        chunk = os.pread(file.fileno(), min(CHUNK_BYTES, came - done), done)
        if not chunk:
            raise CorruptArtifactError(
                f"{file.name} became shorter while it was written, by another process; try again"
            )
        yield chunk
        done += len(chunk)


@dataclass
class _Part:
    """Bytes [start, end) of a file, of which those before `at` have been written."""

    end: int
    at: int
    flushed: int


class _Landing:
    """A file of which parts are written side by side, and how far it has come without a gap."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._given = start
        self._parts: list[_Part] = []
        self._came = start
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_over = False

    @property
    def wants_bytes(self) -> bool:
        """Whether requests shall go on."""
        return not self._is_over

    def next_part(self, requests: int) -> _Part | None:
        """The next bytes to ask for: smaller ones to the end, so that all requests end together."""
        with self._changed:
            left = self._size - self._given
            if self._is_over or not left:
                return None
            size = min(max(left // (2 * requests), LEAST_PART_BYTES), LARGEST_PART_BYTES)
            aligned = (self._given + size) // BLOCK_BYTES * BLOCK_BYTES  # so that a gap has blocks of its own
            part = _Part(min(aligned, self._size), self._given, self._given)
            self._given = part.end
            self._parts.append(part)
            return part

    def write(self, part: _Part, content: memoryview) -> bool:
        """Write a part's next bytes; False where no more are wanted."""
        try:
            while len(content):
                done = os.pwrite(self._descriptor, content[:PIECE_BYTES], part.at)
                part.at += done
                content = content[done:]
        except OSError as error:  # of the disk, which is not the fault of the store
            self.fail(error)
        is_last = part.at >= part.end
        if is_last or part.at - part.flushed >= STEP_BYTES:
            start_flush(self._descriptor, part.flushed, part.at - part.flushed)
            part.flushed = part.at
            with self._changed:
                self._advance()
                self._changed.notify_all()
        return not self._is_over

    def _advance(self) -> None:
        while self._parts:
            self._came = self._parts[0].at
            if self._came < self._parts[0].end:
                return
            self._parts.pop(0)

    def wait_beyond(self, done: int) -> int:
        """How many bytes have come without a gap, once they are more than `done`; raises what a request met."""
        with self._changed:
            while self._came <= done and self._error is None:
                self._changed.wait()
            if self._error:
                raise self._error
            return self._came

    def fail(self, error: BaseException) -> None:
        """End all requests, for this reason."""
        with self._changed:
            self._error = self._error or error
            self._is_over = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Let no request go on."""
        with self._changed:
            self._is_over = True

    def cut(self) -> None:
        """Leave the bytes that came without a gap, behind which a later call goes on."""
        with self._changed:
            self._advance()
        os.ftruncate(self._descriptor, self._came)


class _Crew:
    """Threads that bring all that is left of a file while the body of a `with` runs, as many as the pace allows."""

    def __init__(self, url: str, entry: FileEntry, landing: _Landing) -> None:
        self._url, self._entry, self._landing = url, entry, landing
        self._store = paths.store_of(url)
        self._pace = Pace(LOCAL_READS, LOCAL_READS) if paths.is_local(url) else reading_of(_place(url))
        self._lock = threading.Lock()
        self._working = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> None:
        self._grow()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self._landing.stop()
        for thread in self._threads:
            thread.join()
        if kind:
            self._landing.cut()

    def _grow(self) -> None:
        with self._lock:
            while self._working < self._pace.width and (part := self._landing.next_part(self._pace.width)):
                thread = threading.Thread(target=self._work, args=[part])
                thread.start()
                self._threads.append(thread)
                self._working += 1

    def _work(self, part: _Part | None) -> None:
        try:
            while part:
                self._bring(part)
                part = self._next()
        except BaseException as error:  # carried to the caller's thread
            self._landing.fail(error)

    def _next(self) -> _Part | None:
        """The next part for a thread, or None where it is one too many; under a lock, so that not all of them go."""
        with self._lock:
            width = self._pace.width
            part = self._landing.next_part(width) if self._working <= width else None
            if part is None:
                self._working -= 1
            return part

    def _bring(self, part: _Part) -> None:
        def take(content: memoryview) -> bool:
            self._pace.passed(len(content))
            if self._working < self._pace.width:
                self._grow()
            return self._landing.write(part, content)

        try:
            with self._pace.request():
                self._store.read_through(self._url, part.at, part.end, take)
        except FileNotFoundError as error:  # deleted since its size was asked
            raise missing(self._url) from error
        if part.at < part.end and self._landing.wants_bytes:
            check_size(self._url, self._entry)
            raise CorruptArtifactError(f"{self._url} ended early while it was read; {REMEDY}")


def _place(url: str) -> str:
    """Protocol and bucket."""
    protocol, _, rest = url.partition("://")
    return f"{protocol}://{rest.partition('/')[0]}"
