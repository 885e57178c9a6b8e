"""Where an artifact comes from: settings, versions and commit, recorded in its manifest as it is committed."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from checkpoints import Artifact, ArtifactExistsError, ArtifactWriter, open_artifact, paths, write_artifact
from checkpoints.garbage import sweep
from checkpoints.redact import redact
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.log import json_safe, logger
from modularforge.pipeline import STAGES, Plan, checkpoint_url, contents, fingerprint
from modularforge.run import Run

FROZEN_NAME = "frozen.json"
SETTINGS_NAME = "config.yaml"
PACKAGES = ("modularforge", "torch", "numpy", "tokenizers", "safetensors", "scikit-learn", "fsspec", "datasets")


@contextmanager
def making(plan: Plan, parts: Sequence[Artifact] = ()) -> Iterator[ArtifactWriter]:
    """A writer for the artifact of a plan; nothing appears unless `commit` is called with it.

    With `parts` it goes on with what an interrupted one left, for files that follow from the plan and the bytes of
    these artifacts. (Fingerprints would not do: an expert trained again has the same one, and perhaps other bytes.)
    """
    bytes_of_parts = {str(place): contents(artifact) for place, artifact in enumerate(parts)}
    resume = fingerprint(plan.fingerprint, {}, bytes_of_parts) if parts else ""
    with write_artifact(plan.url, plan.kind, plan.fingerprint, plan.settings, plan.inputs, resume) as writer:
        yield writer


def commit(
    writer: ArtifactWriter, plan: Plan, run: Run, facts: dict[str, Any], old: Artifact | None = None
) -> Artifact:
    """Publish what was written, with `facts` and provenance, in the place of `old` if there is one.

    Where another process made the same artifact first, that one is as good.
    """
    config = run.config
    try:
        artifact = writer.commit(json_safe({**facts, "provenance": provenance(config)}), old=old)
    except ArtifactExistsError:
        artifact = open_artifact(plan.url)
        if artifact.manifest.fingerprint != plan.fingerprint:
            raise
        logger.info("another process finished the same artifact first: %s", plan.url)
        return artifact
    finally:
        run.forget(plan.url)
    save_settings(config)
    _sweep(config, plan)
    logger.info("finished: %s", plan.url)
    return artifact


def _sweep(config: Config, plan: Plan) -> None:
    """Remove what killed processes left: in the whole run by stages that there are once, else in the job's own folder.

    Were it the whole run for each of a thousand experts, all of them would list it a thousand times.
    """
    stage = STAGES.get(plan.stage)  # none for the results of a study, of which there are many too
    if stage is not None and not stage.is_indexed:
        sweep(config.output_dir)
    elif stage is not None:
        sweep(checkpoint_url(config, plan.url.rstrip("/").rpartition("/")[2]))


def save_settings(config: Config) -> None:
    """Write the resolved settings as `config.yaml` at the run's root (rank 0 only, once a stage is found to be due)."""
    url, content = paths.join(config.output_dir, SETTINGS_NAME), redact(to_yaml(config)).encode()
    if not paths.exists(url) or paths.read_bytes(url) != content:
        paths.replace_bytes(url, content)


def provenance(config: Config) -> dict[str, Any]:
    """The resolved settings, package versions, and the commit of the code with a hash of uncommitted changes."""
    return {"config": config.model_dump(mode="json"), "versions": _versions(), **source_commit()}


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def source_commit() -> dict[str, str | None]:
    """Commit and dirty hash of the source tree; both None for an installed package or where git is missing.

    A copy that the launcher froze for its jobs carries them in a file.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / FROZEN_NAME).is_file():
        frozen: dict[str, str | None] = json.loads((root / FROZEN_NAME).read_text())
        return frozen
    head = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is None:
        return {"commit": None, "uncommitted_sha256": None}
    difference = _git(root, "diff", "HEAD") or ""
    dirty = hashlib.sha256(difference.encode()).hexdigest() if difference else None
    return {"commit": head.strip(), "uncommitted_sha256": dirty}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
