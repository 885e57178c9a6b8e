"""Finds what is stored below a URL: the artifacts of a run and its training checkpoints."""

from __future__ import annotations

from checkpoints import paths
from checkpoints.artifact import Artifact, find_artifact
from checkpoints.errors import MissingArtifactError
from checkpoints.manifest import MANIFEST_NAME
from checkpoints.parallel import in_order
from checkpoints.places import ATTEMPT, HIDDEN, FileInfo

READS_AT_ONCE = 8
CHECKPOINT_KIND = "checkpoint"


def find_artifacts(url: str) -> list[Artifact]:
    """All committed artifacts at and below a URL, by URL; raises MissingArtifactError when there are none."""
    artifacts = artifacts_among(url, paths.walk(url))
    if not artifacts:
        raise MissingArtifactError(
            f"{url} must hold a committed artifact, but no {MANIFEST_NAME} is there or below; mend the URL"
        )
    return artifacts


def artifacts_among(url: str, files: list[FileInfo]) -> list[Artifact]:
    """The committed artifacts in a listing of everything below `url`."""
    folders = [folder for info in files if (folder := _artifact_folder(info.url, url)) is not None]
    found = in_order(find_artifact, sorted(folders), READS_AT_ONCE)
    artifacts = [artifact for artifact in found if artifact is not None]
    named = {artifact.file_url(name) for artifact in artifacts for name in artifact.manifest.files}
    return [artifact for artifact in artifacts if paths.join(artifact.url, MANIFEST_NAME) not in named]


def newest_checkpoints(artifacts: list[Artifact]) -> list[Artifact]:
    """Of every job that has training checkpoints, the newest one."""
    newest: dict[str, Artifact] = {}
    for artifact in artifacts:
        if artifact.manifest.kind == CHECKPOINT_KIND:
            job = artifact.url.rsplit("/", 1)[0]
            newest[job] = max(newest.get(job, artifact), artifact, key=lambda one: int(one.manifest.facts["step"]))
    return list(newest.values())


def _artifact_folder(file_url: str, root: str) -> str | None:
    """The folder of a manifest that readers may see, or None for any other file."""
    names = paths.relative(file_url, root).split("/")
    unfinished = any(ATTEMPT.fullmatch(name) or HIDDEN.fullmatch(name) for name in names)
    return file_url.removesuffix(f"/{MANIFEST_NAME}") if names[-1] == MANIFEST_NAME and not unfinished else None
