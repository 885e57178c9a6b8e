"""Which files of an unfinished artifact are whole, so that an interrupted writer of the same artifact goes on.

A resumable writer uses one place for all that makes the same bytes. On a folder it locks the scratch folder; where
another process holds the lock, or the file system knows none, a writer takes a place of its own. On an object store two
such writers write the same bytes under the same keys, so they need no lock.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from checkpoints import paths
from checkpoints.errors import StoreError
from checkpoints.hashing import FileEntry
from checkpoints.manifest import file_entries
from checkpoints.parsing import parse_object


class Journal:
    """The finished files of one unfinished artifact, kept beside them; without `url`, nothing is kept."""

    def __init__(self, url: str = "") -> None:
        self._url = url
        self._entries: dict[str, FileEntry] = {}

    def read(self, folder: str) -> dict[str, FileEntry]:
        """Entries of the files that an earlier writer finished and that still lie in `folder` with their size."""
        if not self._url:
            return {}
        try:
            entries = file_entries(parse_object(paths.read_bytes(self._url)))
        except (FileNotFoundError, ValueError):  # none yet, or torn by a crash
            return {}
        self._entries = {
            name: entry for name, entry in entries.items() if _size(paths.join(folder, name)) == entry.size
        }
        return dict(self._entries)

    def add(self, name: str, entry: FileEntry) -> None:
        """Note that a file is whole and on the disk."""
        if self._url:
            self._entries[name] = entry
            content = json.dumps({key: asdict(value) for key, value in self._entries.items()}).encode()
            paths.replace_bytes(self._url, content)

    def remove(self) -> None:
        """Forget all, before the artifact is committed."""
        if self._url:
            paths.remove(self._url)


def attempt_of(identity: str) -> str:
    """The attempt that all resumable writers of the same bytes share, from a hash of what the bytes depend on."""
    return f"attempt-{identity[:12]}"


def _size(url: str) -> int:
    try:
        return paths.file_size(url)
    except (FileNotFoundError, StoreError):
        return -1
