"""Copies what a run needs to be looked at and no artifact holds: settings, metrics and logs.

These files are small and may change while jobs run, so they are copied whole and without hashes, each in one step.
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints import paths
from checkpoints.errors import CorruptArtifactError
from checkpoints.names import UnsafeNameError, checked_path
from checkpoints.places import ATTEMPT, FileInfo

KINDS = (".yaml", ".jsonl", ".log")
TENSORBOARD = "events.out.tfevents."


def loose_files(url: str, files: Iterable[FileInfo], artifacts: Iterable[str]) -> list[FileInfo]:
    """Settings, metrics, logs and TensorBoard events of a listing that lie in no artifact and no hidden folder."""
    owned = tuple(f"{artifact.rstrip('/')}/" for artifact in artifacts)
    return [info for info in files if not info.url.startswith(owned) and _is_loose(paths.relative(info.url, url))]


def copy_loose_file(root: str, url: str, target: str) -> str | None:
    """Copy a file below `root` to the same place below `target`, over an older version, and return where it is now.

    None when what is there is the same or goes on where this file ends: metrics and logs only grow, so a target that
    begins with the whole source is the newer one and stays. Raises CorruptArtifactError for a name or a link that leads
    out of `root`, and for what is no file.
    """
    target = paths.join(target, _checked_name(root, url))
    if paths.is_local(url):
        paths.check_within(paths.local_path(url), paths.local_path(root))
    content = paths.read_bytes(url)
    if paths.exists(target) and paths.read_bytes(target).startswith(content):
        return None
    try:
        paths.replace_bytes(target, content)
    except (FileExistsError, NotADirectoryError) as error:
        raise CorruptArtifactError(
            f"{target} must be free for {url}, but {error.filename} is in its way; move it away"
        ) from error
    return target


def _checked_name(root: str, url: str) -> str:
    try:
        return checked_path(paths.relative(url, root))
    except UnsafeNameError as error:
        raise CorruptArtifactError(f"{url!r:.200} must have a plain name, but {error}; rename or delete it") from error


def _is_loose(name: str) -> bool:
    parts = name.split("/")
    unfinished = any(part.startswith(".") or ATTEMPT.fullmatch(part) for part in parts)
    return not unfinished and (parts[-1].endswith(KINDS) or parts[-1].startswith(TENSORBOARD))
