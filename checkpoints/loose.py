"""Copies what a run needs to be looked at and no artifact holds: settings, metrics and logs.

These files are small and may change while jobs run, so they are copied whole and without hashes, each in one step.
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints import paths
from checkpoints.artifact import Artifact
from checkpoints.places import ATTEMPT, FileInfo

KINDS = (".yaml", ".jsonl", ".log")
TENSORBOARD = "events.out.tfevents."


def loose_files(url: str, files: Iterable[FileInfo], artifacts: Iterable[Artifact]) -> list[FileInfo]:
    """Settings, metrics, logs and TensorBoard events of a listing that are in no artifact and no hidden folder."""
    owned = tuple(f"{artifact.url.rstrip('/')}/" for artifact in artifacts)
    return [info for info in files if not info.url.startswith(owned) and _is_loose(paths.relative(info.url, url))]


def copy_loose_file(url: str, target: str) -> bool:
    """Copy one file, over an older version; False when the target is the same or goes on where this file ends.

    Metrics and logs only grow: a target that begins with the whole source is the newer one and stays.
    """
    content = paths.read_bytes(url)
    if paths.exists(target) and paths.read_bytes(target).startswith(content):
        return False
    paths.replace_bytes(target, content)
    return True


def _is_loose(name: str) -> bool:
    parts = name.split("/")
    unfinished = any(part.startswith(".") or ATTEMPT.fullmatch(part) for part in parts)
    return not unfinished and (parts[-1].endswith(KINDS) or parts[-1].startswith(TENSORBOARD))
