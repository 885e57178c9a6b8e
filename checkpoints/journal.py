"""Which files of an unfinished artifact are whole, so that an interrupted writer of the same artifact goes on.

A resumable writer uses one place for all that makes the same bytes. On a folder it locks the scratch folder; where
another process holds the lock, or the file system knows none, a writer takes a place of its own. On an object store two
such writers write the same bytes under the same keys, so they need no lock.

It is only ever appended to, so that ten thousand files cost as many lines and not their square: to a file in a folder,
and to an object store as an object for each entry, as objects cannot grow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator

from checkpoints import paths
from checkpoints.hashing import FileEntry
from checkpoints.manifest import file_entries
from checkpoints.parallel import in_order
from checkpoints.parsing import parse_object

READS_AT_ONCE = 16


class Journal:
    """The finished files of one unfinished artifact, kept beside them; without `url`, nothing is kept."""

    def __init__(self, url: str = "") -> None:
        self._url = url

    def read(self, folder: str) -> dict[str, FileEntry]:
        """Entries of the files that an earlier writer finished and that still lie in `folder` with their size."""
        if not self._url:
            return {}
        sizes = {paths.relative(info.url, folder): info.size for info in paths.walk(folder)}
        entries: dict[str, FileEntry] = {}
        for line in self._lines():
            try:
                entries |= file_entries(parse_object(line))
            except ValueError:  # torn by a crash
                continue
        return {name: entry for name, entry in entries.items() if sizes.get(name) == entry.size}

    def add(self, name: str, entry: FileEntry) -> None:
        """Note that a file is whole and on the disk."""
        if not self._url:
            return
        line = json.dumps({name: entry.to_values()}).encode()
        if paths.is_local(self._url):
            with paths.open_to_append(paths.local_path(self._url)) as file:
                file.write(b"\n" + line)  # not behind it: the last line may be torn
                file.flush()
                os.fsync(file.fileno())
        else:  # named by the file, so that two writers of the same bytes agree
            paths.replace_bytes(paths.join(self._url, hashlib.sha256(name.encode()).hexdigest()[:32]), line)

    def remove(self) -> None:
        """Forget all, before the artifact is committed."""
        if self._url:
            paths.remove(self._url)

    def _lines(self) -> Iterator[bytes]:
        is_local = paths.is_local(self._url)
        places = [self._url] if is_local else [info.url for info in paths.walk(self._url)]
        for content in in_order(_read, places, READS_AT_ONCE):
            yield from content.splitlines()


def _read(url: str) -> bytes:
    """What stands there: nothing yet, or no more, where another writer of the same bytes has just committed them."""
    try:
        return paths.read_bytes(url)
    except FileNotFoundError:
        return b""


def attempt_of(identity: str) -> str:
    """The attempt that all resumable writers of the same bytes share, from a hash of what the bytes depend on."""
    return f"attempt-{identity[:12]}"
