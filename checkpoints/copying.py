"""Copies artifacts between any two places, checked while they pass, and goes on where an interrupted copy stopped.

The files are the same bytes on both sides and `created` stays; only `attempt` and `files_in` differ in the manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints import paths
from checkpoints.artifact import Artifact, find_artifact
from checkpoints.errors import ArtifactExistsError, StoreError
from checkpoints.fetching import fetch_file
from checkpoints.owners import locked
from checkpoints.parallel import in_order
from checkpoints.retry import call
from checkpoints.streams import passing_file
from checkpoints.writer import ArtifactWriter

FILES_AT_ONCE = 3
Report = Callable[[int], object]


def copy_artifact(source: Artifact, target_url: str, report: Report) -> bool:
    """Copy one artifact; False when it is there already. `report` is told the bytes that are done.

    Raises ArtifactExistsError when the target holds another artifact, CorruptArtifactError when the source is damaged.
    """
    existing = find_artifact(target_url)
    if existing is not None:
        _require_same(source, existing)
        report(source.manifest.size)
        return False
    writer = _writer(source, target_url)
    if paths.is_local(target_url):
        _copy_to_folder(source, writer, report)
    else:
        _copy_to_objects(source, writer, report)
    return True


def _writer(source: Artifact, target_url: str) -> ArtifactWriter:
    """A writer whose attempt follows from the source, so that the same copy finds its own unfinished work."""
    attempt = f"attempt-{hashlib.sha256(source.manifest.to_json()).hexdigest()[:12]}"
    target = paths.local_path(target_url)
    folder = target.with_name(f".{target.name}.{attempt}") if paths.is_local(target_url) else Path(os.devnull)
    return ArtifactWriter(target_url, folder, attempt, source.manifest)


def _copy_to_folder(source: Artifact, writer: ArtifactWriter, report: Report) -> None:
    call("write", writer.url, lambda: writer.folder.mkdir(parents=True, exist_ok=True))
    with locked(writer.folder, resumes=True) as is_mine:
        if not is_mine:
            raise StoreError(f"{writer.folder} must have one writer, but another copy is running; wait for it")

        def fetch(name: str) -> str:
            entry, target = source.manifest.files[name], writer.folder / name
            call("write", writer.url, lambda: fetch_file(source.file_url(name), entry, target, report))
            return name

        for name in in_order(fetch, source.manifest.files, FILES_AT_ONCE):
            writer.adopt(name, source.manifest.files[name])
        writer.commit(source.manifest.facts, source.manifest.created)


def _copy_to_objects(source: Artifact, writer: ArtifactWriter, report: Report) -> None:
    root = paths.join(writer.url, writer.attempt)
    there = {paths.relative(info.url, root): info.size for info in paths.walk(root)}

    def send(name: str) -> str:
        entry = source.manifest.files[name]
        if there.get(name) == entry.size:  # uploads are atomic, and this key holds nothing but this file
            report(entry.size)
        else:
            writer.upload_copy(name, _reported(passing_file(source.file_url(name), entry), report), entry)
        return name

    for name in in_order(send, source.manifest.files, FILES_AT_ONCE):
        writer.adopt(name, source.manifest.files[name])
    writer.commit(source.manifest.facts, source.manifest.created)


def _reported(parts: Iterator[memoryview], report: Report) -> Iterator[memoryview]:
    for part in parts:
        yield part
        report(len(part))


def _require_same(source: Artifact, existing: Artifact) -> None:
    if existing.manifest.files != source.manifest.files:
        raise ArtifactExistsError(
            f"{existing.url} must be free or the same as {source.url}, but holds another artifact; "
            "delete it or choose another target"
        )
