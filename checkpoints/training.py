"""Training checkpoints: resumable state of one job, as safetensors and JSON, never pickle.

A job's checkpoints lie under one URL as artifacts ``step-00000200``. The newest committed one is loaded, whole and
checked, or an error says why not: never an older one unless asked, and never none when there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from checkpoints import paths
from checkpoints.artifact import Artifact, find_artifact, open_artifact
from checkpoints.errors import ArtifactExistsError, CorruptArtifactError, MissingArtifactError, StoreError
from checkpoints.manifest import CHECKPOINT_KIND
from checkpoints.pieces import (
    PIECE_KIND,
    PIECES_NAME,
    TENSORS_NAME,
    Part,
    described,
    pieces_of,
    pieces_url,
    read_pieces,
    sweep_pieces,
)
from checkpoints.retry import logger
from checkpoints.streams import check_size
from checkpoints.tensors import read_weight_file, weight_file_chunks, weight_file_size
from checkpoints.urls import DAMAGED, MANIFEST_NAME, hidden_name
from checkpoints.writer import ArtifactWriter, write_artifact

STATE_NAME = "state.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """All that restarts a job exactly: tensors by name and plain values, at `step`."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(url: str, checkpoint: Checkpoint, fingerprint: str, keep_last: int, keep_every: int = 0) -> None:
    """Commit one checkpoint under `url`, then delete old ones (called on rank 0 only).

    The newest `keep_last` stay, and those whose step is a multiple of `keep_every`. Raises ArtifactExistsError when
    another job has committed another state for this step.
    """
    target = paths.join(url, f"step-{checkpoint.step:08d}")
    with write_artifact(target, CHECKPOINT_KIND, fingerprint) as writer:
        _write_tensors(writer, checkpoint)
        writer.write_json(STATE_NAME, checkpoint.state)
        _commit(writer, checkpoint.step, fingerprint)
    delete_old_checkpoints(url, checkpoint.step, keep_last, keep_every)


def save_piece(url: str, checkpoint: Checkpoint, fingerprint: str, part: Part) -> None:
    """Commit what one rank holds of a checkpoint (called on each rank whose piece no other has)."""
    target = paths.join(pieces_url(url, checkpoint.step), part.name)
    with write_artifact(target, PIECE_KIND, fingerprint) as writer:
        _write_tensors(writer, checkpoint)
        _commit(writer, checkpoint.step, fingerprint)


def commit_pieces(
    url: str, checkpoint: Checkpoint, fingerprint: str, part: Part, keep_last: int, keep_every: int = 0
) -> None:
    """Commit a checkpoint all pieces of which are committed, then delete old ones (called on rank 0 only).

    Of `part`, count and rows are read; of `checkpoint`, step and state.
    """
    target = paths.join(url, f"step-{checkpoint.step:08d}")
    with write_artifact(target, CHECKPOINT_KIND, fingerprint) as writer:
        writer.write_json(PIECES_NAME, described(url, checkpoint.step, part.count, part.rows))
        writer.write_json(STATE_NAME, checkpoint.state)
        _commit(writer, checkpoint.step, fingerprint)
    delete_old_checkpoints(url, checkpoint.step, keep_last, keep_every)


def _write_tensors(writer: ArtifactWriter, checkpoint: Checkpoint) -> None:
    chunks = weight_file_chunks(checkpoint.tensors)
    writer.write_chunks(TENSORS_NAME, chunks, weight_file_size(checkpoint.tensors))


def _commit(writer: ArtifactWriter, step: int, fingerprint: str) -> None:
    try:
        writer.commit({"step": step})
    except ArtifactExistsError as error:
        _accept_same_state(writer, fingerprint, error)


def list_checkpoints(url: str) -> list[str]:
    """Names of the committed checkpoints under `url`, oldest first; anything else that lies there is ignored."""
    names = [name for name in paths.list_folder(url) if STEP_NAME.fullmatch(name)]
    committed = [name for name in names if paths.exists(paths.join(url, name, MANIFEST_NAME))]
    return sorted(committed, key=step_of)


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


def load_checkpoint(url: str, fingerprint: str, part: Part | None = None) -> Checkpoint:
    """One checkpoint, or a part of it, every byte checked; raises StoreError when it is another config's.

    CorruptArtifactError when it is damaged. However many pieces it was written in, it is read in any other number.
    """
    artifact, step, state = open_checkpoint(url, fingerprint)
    if PIECES_NAME in artifact.manifest.files:
        return Checkpoint(step, read_pieces(artifact, part), state)
    tensors = read_weight_file(artifact, TENSORS_NAME)
    return Checkpoint(step, tensors if part is None else part.of(tensors), state)


def open_checkpoint(url: str, fingerprint: str) -> tuple[Artifact, int, dict[str, Any]]:
    """A checkpoint without its tensors: its artifact, step and state; raises what `load_checkpoint` does."""
    artifact = open_artifact(url)
    if artifact.manifest.fingerprint != fingerprint:
        raise StoreError(
            f"{url} must be a checkpoint of this config, but was written with other settings or data; "
            f"use another --output-dir, or delete {os.path.dirname(url)} to start this job again"
        )
    state = artifact.read_json(STATE_NAME)
    if artifact.manifest.step is None or not isinstance(state, dict):
        raise CorruptArtifactError(f"{url} must be a training checkpoint, but is another artifact; move it away")
    return artifact, artifact.manifest.step, state


def load_newest_checkpoint(
    url: str, fingerprint: str, fallback: bool = False, part: Part | None = None
) -> Checkpoint | None:
    """The newest committed checkpoint, or None when none was ever committed.

    A damaged one is CorruptArtifactError. With `fallback` it is set aside with a loud record and the next older one is
    loaded; when none loads, that is an error too, never None.
    """
    load = partial(load_checkpoint, fingerprint=fingerprint, part=part)
    return newest_that_loads(url, list_checkpoints(url), load, fallback)


def newest_that_loads(
    url: str, names: Sequence[str], load: Callable[[str], Checkpoint], fallback: bool, is_main: bool = True
) -> Checkpoint | None:
    """The same of the checkpoints of these names, oldest first, by `load` of a URL; `is_main` speaks and sets aside."""
    damaged: list[str] = []
    for name in reversed(names):
        try:
            checkpoint = load(paths.join(url, name))
        except CorruptArtifactError as error:
            if not fallback:
                raise CorruptArtifactError(
                    f"{error}\n{paths.join(url, name)} is the newest checkpoint and cannot be loaded; restore it, "
                    f"or go on from an older one ({len(names) - 1} there), without the work since then, with "
                    "--set training.checkpoint_fallback=true"
                ) from error
            if is_main:
                logger.error("CHECKPOINT DAMAGED, falling back to an older one: %s", error)
            damaged.append(name)
            continue
        for bad in damaged if is_main else ():
            logger.error("FALLBACK: training goes on from step %d, not from %s", checkpoint.step, paths.join(url, bad))
            set_aside(paths.join(url, bad))
        return checkpoint
    if names:
        raise CorruptArtifactError(
            f"{url} must hold a checkpoint that loads, but all {len(names)} are damaged; "
            f"restore one, or delete {url} to start this job again from step 0"
        )
    return None


def delete_old_checkpoints(url: str, newest: int, keep_last: int, keep_every: int = 0) -> None:
    """Delete checkpoints before step `newest` but for the ones to keep; does nothing unless that step is whole."""
    older = [name for name in list_checkpoints(url) if step_of(name) < newest]
    spare = older[: max(0, len(older) - (max(1, keep_last) - 1))]
    doomed = [name for name in spare if not (keep_every and step_of(name) % keep_every == 0)]
    if not doomed or not _is_whole(paths.join(url, f"step-{newest:08d}")):
        return
    for name in doomed:
        try:
            paths.remove(paths.join(url, name))
        except StoreError as error:  # the new checkpoint is safe; a full disk later would be a new error
            logger.warning("an old checkpoint stays: %s", error)
    sweep_pieces(url, {step_of(name) for name in list_checkpoints(url)}, newest)


def forget_unfinished(url: str) -> None:
    """Delete pieces of steps that were never committed, so that a job may come there again (on rank 0, at its start).

    Steps that were set aside as damaged lose theirs as well.
    """
    sweep_pieces(url, {step_of(name) for name in list_checkpoints(url)})


def set_aside(url: str) -> None:
    """Make a damaged checkpoint invisible, so that its step can be saved again; `gc` deletes what is left of it."""
    if paths.is_local(url):
        path = paths.local_path(url)
        if path.exists():
            os.rename(path, path.with_name(hidden_name(f"{path.name}.{DAMAGED}")))
        return
    manifest = paths.join(url, MANIFEST_NAME)
    if paths.exists(manifest):
        paths.replace_bytes(paths.join(url, f"damaged.{MANIFEST_NAME}"), paths.read_bytes(manifest))
        paths.store_of(url).delete([manifest])


def _accept_same_state(writer: ArtifactWriter, fingerprint: str, error: ArtifactExistsError) -> None:
    """Two jobs that hold the same bytes do no harm; a job whose state differs must stop."""
    existing = find_artifact(writer.url)
    if existing and existing.manifest.fingerprint == fingerprint and existing.manifest.files == writer.files:
        logger.warning("%s was committed by another job with the same bytes; is this job running twice?", writer.url)
        return
    raise ArtifactExistsError(
        f"{writer.url} must be written by one job, but another has committed a different state for this step; "
        "stop one of the two, and start the other again"
    ) from error


def _is_whole(url: str) -> bool:
    artifact: Artifact | None = find_artifact(url)
    if artifact is None:
        return False
    try:
        for part in (artifact, *pieces_of(artifact)):
            for name, entry in part.manifest.files.items():
                check_size(part.file_url(name), entry)
    except (CorruptArtifactError, MissingArtifactError) as error:
        logger.error("old checkpoints are kept: %s", error)
        return False
    return True
