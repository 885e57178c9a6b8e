"""Finds what is stored below a URL: the artifacts of a run and its training checkpoints."""

from __future__ import annotations

from checkpoints import paths
from checkpoints.artifact import Artifact, find_artifact
from checkpoints.errors import CorruptArtifactError, MissingArtifactError
from checkpoints.manifest import MANIFEST_NAME
from checkpoints.parallel import in_order
from checkpoints.places import ATTEMPT, HIDDEN

READS_AT_ONCE = 8
CHECKPOINT_KIND = "checkpoint"


def find_artifacts(url: str) -> list[Artifact]:
    """All committed artifacts at and below a URL, by URL; raises MissingArtifactError when there are none."""
    artifacts, damaged = examine(url)
    if damaged:
        raise CorruptArtifactError("\n".join(damaged))
    return artifacts


def examine(url: str) -> tuple[list[Artifact], list[str]]:
    """All committed artifacts at and below a URL, and what is wrong with manifests that cannot be read."""
    folders = [folder for info in paths.walk(url) if (folder := _artifact_folder(info.url, url)) is not None]
    if not folders:
        raise MissingArtifactError(
            f"{url} must hold a committed artifact, but no {MANIFEST_NAME} is there or below; mend the URL"
        )
    found = list(in_order(_open, sorted(folders), READS_AT_ONCE))
    artifacts = [one for one in found if isinstance(one, Artifact)]
    named = {artifact.file_url(name) for artifact in artifacts for name in artifact.manifest.files}
    whole = [artifact for artifact in artifacts if paths.join(artifact.url, MANIFEST_NAME) not in named]
    return whole, [str(one) for one in found if isinstance(one, CorruptArtifactError)]


def newest_checkpoints(url: str) -> list[Artifact]:
    """Of every job below a URL that has training checkpoints, the newest one; raises MissingArtifactError."""
    newest: dict[str, Artifact] = {}
    for artifact in find_artifacts(url):
        if artifact.manifest.kind == CHECKPOINT_KIND:
            job = artifact.url.rsplit("/", 1)[0]
            newest[job] = max(newest.get(job, artifact), artifact, key=lambda one: int(one.manifest.facts["step"]))
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


def _artifact_folder(file_url: str, root: str) -> str | None:
    """The folder of a manifest that readers may see, or None for any other file."""
    names = paths.relative(file_url, root).split("/")
    unfinished = any(ATTEMPT.fullmatch(name) or HIDDEN.fullmatch(name) for name in names)
    return file_url.removesuffix(f"/{MANIFEST_NAME}") if names[-1] == MANIFEST_NAME and not unfinished else None
