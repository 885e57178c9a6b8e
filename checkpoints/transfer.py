"""Copies a run, one artifact or the newest checkpoints, and goes on past what is damaged: all the rest arrives.

Also what a run needs to be looked at and no artifact holds: settings, metrics and logs. These files are small and may
change while jobs run, so they are copied whole and without hashes, each in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from checkpoints import paths
from checkpoints.artifact import Artifact, examine, newest_checkpoints
from checkpoints.copying import copy_artifact
from checkpoints.errors import (
    AccessError,
    CorruptArtifactError,
    MissingBucketError,
    StoreError,
    StoreFullError,
    UnreachableError,
)
from checkpoints.manifest import CHECKPOINT_KIND
from checkpoints.notes import Read, notes_of, read_lines
from checkpoints.parallel import in_order
from checkpoints.urls import ATTEMPT, FileInfo, UnsafeNameError, checked_path

Report = Callable[[int], object]
# These would be said of everything that follows as well.
FATAL = (AccessError, MissingBucketError, StoreFullError, UnreachableError)
SMALL_BYTES = 8 << 20  # as many at once hold no more than one large file's parts on their way
SMALL_AT_ONCE = 8
KINDS = (".yaml", ".jsonl", ".log")
TENSORBOARD = "events.out.tfevents."


@dataclass(frozen=True)
class Selection:
    """What is to be copied, and what is wrong with manifests that cannot be read; `notes` are some of the `loose`."""

    source: str
    artifacts: list[Artifact]
    loose: list[str]
    problems: list[str]
    notes: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Bytes of the artifacts."""
        return sum(artifact.manifest.size for artifact in self.artifacts)


@dataclass
class Outcome:
    """What became of it: URLs that were copied, that vanished meanwhile, and sentences on what was not copied."""

    copied: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    copied_files: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Take in what became of another part."""
        for name, found in vars(other).items():
            getattr(self, name).extend(found)


def select(source: str, newest: bool) -> Selection:
    """All artifacts below a URL and the loose files of a run, or only the newest checkpoint of every job.

    Notes of which each line is an object count as the file that they are on a folder.
    """
    artifacts, damaged = examine(source)
    if newest:
        return Selection(source, newest_checkpoints(artifacts, source), [], [*damaged.values()])
    owners = [*(artifact.url for artifact in artifacts), *damaged]
    is_run = all(owner.rstrip("/") != source.rstrip("/") for owner in owners)
    there = paths.walk(source) if is_run else []
    loose = [info.url for info in loose_files(source, there, owners)]
    notes = {} if paths.is_local(source) else {paths.join(source, name): None for name in _notes(source, there)}
    return Selection(source, artifacts, [*dict.fromkeys((*loose, *notes))], [*damaged.values()], frozenset(notes))


def transfer(chosen: Selection, target: str, report: Report) -> Outcome:
    """Copy what was chosen; only trouble that concerns all of it is raised. `report` is told the bytes done."""
    outcome = Outcome(problems=[*chosen.problems])
    alone = _not_side_by_side(chosen.artifacts)
    for is_small, found in groupby(chosen.artifacts, lambda artifact: artifact.url not in alone):
        at_once = SMALL_AT_ONCE if is_small else 1
        for one in in_order(lambda artifact: _copy_artifact(artifact, chosen.source, target, report), found, at_once):
            outcome.add(one)
    _copy_loose(chosen, target, outcome)
    if paths.is_local(chosen.source):
        links = paths.linked_folders(paths.local_path(chosen.source))
        outcome.passed_over += [f"{link} is a link to a folder, which is copied only by its own name" for link in links]
    return outcome


def _not_side_by_side(artifacts: Sequence[Artifact]) -> set[str]:
    """URLs of those that are copied one after another.

    Where bytes take the time, not requests; checkpoints, as one in pieces is committed behind its pieces; and what
    others lie in, as on a folder it is renamed into its place before they are there.
    """
    urls = sorted(artifact.url.rstrip("/").split("/") for artifact in artifacts)  # by parts: `-` is before `/`
    outer = {"/".join(first) for first, second in pairwise(urls) if second[: len(first)] == first}
    return {
        artifact.url
        for artifact in artifacts
        if artifact.manifest.size > SMALL_BYTES
        or artifact.manifest.kind == CHECKPOINT_KIND
        or artifact.url.rstrip("/") in outer
    }


def _copy_artifact(artifact: Artifact, source: str, target: str, report: Report) -> Outcome:
    outcome = Outcome()
    place = paths.join(target, paths.relative(artifact.url, source))
    try:
        outcome.copied += [place] if copy_artifact(artifact, place, report) else []
    except FATAL:
        raise
    except StoreError as error:
        if isinstance(error, CorruptArtifactError) and artifact.is_deleted():
            outcome.deleted.append(artifact.url)
        else:
            outcome.problems.append(str(error))
    except (FileExistsError, NotADirectoryError):
        if paths.local_path(target).is_file():  # as said, of everything
            raise
        outcome.problems.append(
            f"{place} must be free for {artifact.url}, but a file stands where its folder would be; move it away"
        )
    return outcome


def _copy_loose(chosen: Selection, target: str, outcome: Outcome) -> None:
    for url in chosen.loose:
        try:
            place = copy_loose_file(chosen.source, url, target, read_lines if url in chosen.notes else paths.read_bytes)
            outcome.copied_files += [place] if place else []
        except FATAL:
            raise
        except StoreError as error:
            outcome.passed_over.append(str(error))
        except FileNotFoundError:
            outcome.passed_over.append(f"{url} is gone since it was listed")


def _notes(source: str, files: Iterable[FileInfo]) -> Iterable[str]:
    """Names of the notes whose lines are among these objects."""
    return filter(None, (notes_of(paths.relative(info.url, source)) for info in files))


def loose_files(url: str, files: Iterable[FileInfo], artifacts: Iterable[str]) -> list[FileInfo]:
    """Settings, metrics, logs and TensorBoard events of a listing that lie in no artifact and no hidden folder."""
    owned = tuple(f"{artifact.rstrip('/')}/" for artifact in artifacts)
    return [info for info in files if not info.url.startswith(owned) and _is_loose(paths.relative(info.url, url))]


def copy_loose_file(root: str, url: str, target: str, read: Read = paths.read_bytes) -> str | None:
    """Copy a file below `root` to the same place below `target`, over an older version, and return where it is now.

    None when what is there is the same or goes on where this file ends: metrics and logs only grow, so a target that
    begins with the whole source is the newer one and stays. Raises CorruptArtifactError for a name or a link that leads
    out of `root`, and for what is no file.
    """
    target = paths.join(target, _checked_name(root, url))
    if paths.is_local(url):
        paths.check_within(paths.local_path(url), paths.local_path(root))
    content = read(url)
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
