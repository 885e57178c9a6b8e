"""What several jobs have made of one stage: taken into the whole, and removed once that is there."""

from __future__ import annotations

from contextlib import suppress

from checkpoints import Artifact, ArtifactWriter, paths
from modularforge.pipeline import JobName
from modularforge.run import Run


def take(writer: ArtifactWriter, part: Artifact, name: str, target: str = "") -> None:
    """A file of a task, called `target` or as there: another name of it, a copy that the store makes, or its bytes."""
    url, entry = part.file_url(name), part.manifest.files[name]
    if not writer.link(target or name, url, entry):
        writer.write_chunks(target or name, part.stream(name), entry.size)


def remove_parts(run: Run, *stages: str) -> None:
    """Remove what tasks have made, which is in the whole now: a share before what it was made from."""
    if not run.config.cluster.prepare_tasks:
        return
    folder = run.url("vocabulary").rpartition("/")[0]
    for name in sorted(paths.list_folder(folder), key=lambda name: JobName.parse(name).index is None):
        if JobName.parse(name).stage in stages:
            paths.remove(paths.join(folder, name))
            run.forget(paths.join(folder, name))
    if paths.is_local(folder):
        with suppress(OSError):  # it holds something else
            paths.local_path(folder).rmdir()
