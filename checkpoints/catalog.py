"""Finds what is stored below a URL: the artifacts of a run and its training checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints import paths
from checkpoints.artifact import Artifact, find_artifact
from checkpoints.errors import CorruptArtifactError, MissingArtifactError
from checkpoints.forms import CHECKPOINT_KIND
from checkpoints.names import UnsafeNameError, checked_path
from checkpoints.parallel import in_order
from checkpoints.places import ATTEMPT, HIDDEN, MANIFEST_NAME

READS_AT_ONCE = 8


def find_artifacts(url: str) -> list[Artifact]:
    """All committed artifacts at and below a URL, by URL; raises MissingArtifactError when there are none."""
    artifacts, damaged = examine(url)
    if damaged:
        raise CorruptArtifactError("\n".join(damaged.values()))
    return artifacts


def examine(url: str) -> tuple[list[Artifact], dict[str, str]]:
    """All committed artifacts at and below a URL, and by URL what is wrong with manifests that cannot be read."""
    folders, unsafe = _artifact_folders(url)
    if not folders and not unsafe:
        raise MissingArtifactError(
            f"{url} must hold a committed artifact, but no {MANIFEST_NAME} is there or below; mend the URL"
        )
    found = dict(zip(folders, in_order(_open, folders, READS_AT_ONCE), strict=True))
    artifacts = [one for one in found.values() if isinstance(one, Artifact)]
    named = {artifact.place_of(name) for artifact in artifacts for name in artifact.manifest.files}
    whole = [artifact for artifact in artifacts if paths.join(artifact.url, MANIFEST_NAME) not in named]
    damaged = {folder: str(one) for folder, one in found.items() if isinstance(one, CorruptArtifactError)}
    return whole, {**unsafe, **damaged}


def newest_checkpoints(artifacts: Iterable[Artifact], url: str) -> list[Artifact]:
    """Of every job that has training checkpoints, the newest one; raises MissingArtifactError, which names the URL."""
    newest: dict[str, Artifact] = {}
    for artifact in artifacts:
        if artifact.manifest.kind == CHECKPOINT_KIND:
            job = artifact.url.rsplit("/", 1)[0]
            newest[job] = max(newest.get(job, artifact), artifact, key=lambda one: one.manifest.step or 0)
    if not newest:
        raise MissingArtifactError(
            f"{url} must hold a training checkpoint, but only other artifacts are there; leave out --newest"
        )
    return list(newest.values())


def _open(url: str) -> Artifact | CorruptArtifactError | None:
    try:
        return find_artifact(url)
    except CorruptArtifactError as error:
        return error


def _artifact_folders(root: str) -> tuple[list[str], dict[str, str]]:
    """The folders of manifests that readers may see, sorted, and what is wrong with the names of others."""
    folders: list[str] = []
    unsafe: dict[str, str] = {}
    for info in paths.walk(root):
        name = paths.relative(info.url, root)
        parts = name.split("/")
        if parts[-1] != MANIFEST_NAME or any(ATTEMPT.fullmatch(part) or HIDDEN.fullmatch(part) for part in parts):
            continue
        try:
            checked_path(name)
            folders.append(info.url.removesuffix(f"/{MANIFEST_NAME}"))
        except UnsafeNameError as error:
            unsafe[info.url] = (
                f"{info.url!r:.200} must have a plain name below {root}, but {error}; rename or delete it"
            )
    return sorted(folders), unsafe
