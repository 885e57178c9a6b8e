"""Training checkpoints in pieces: each rank writes the rows that it holds, and reads the rows that it needs.

Beside `step-00000200` lies a folder `pieces-00000200` with an artifact for each piece, such as `2-of-4`. The step's own
artifact is committed last and names their hashes, so that it exists only when all of them do. A tensor's rows are cut
as `torch.chunk` does; what has no rows to cut is in each piece.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints import paths
from checkpoints.artifact import Artifact, open_artifact
from checkpoints.errors import CorruptArtifactError
from checkpoints.tensors import read_weight_file

PIECES_NAME = "pieces.json"
PIECE_KIND = "training-piece"
TENSORS_NAME = "state.safetensors"
FOLDER_NAME = re.compile(r"pieces-(\d{8,})")


@dataclass(frozen=True)
class Part:
    """Which of how many pieces one is, and how many rows the tensors have, over all pieces, that are cut."""

    index: int
    count: int
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its artifact."""
        return f"{self.index + 1}-of-{self.count}"

    def span(self, tensor: str) -> range:
        """Its rows of a tensor."""
        total = self.rows[tensor]
        size = -(-total // self.count)
        return range(min(self.index * size, total), min((self.index + 1) * size, total))

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its rows of whole tensors."""
        spans = {name: self.span(name) for name in self.rows}
        return {
            name: tensor[spans[name].start : spans[name].stop].clone() if name in spans else tensor
            for name, tensor in tensors.items()
        }


def pieces_url(url: str, step: int) -> str:
    """Where the pieces of a job's checkpoint lie."""
    return paths.join(url, f"pieces-{step:08d}")


def described(url: str, step: int, count: int, rows: Mapping[str, int]) -> dict[str, Any]:
    """What a step's artifact says of its pieces; raises MissingArtifactError unless all are committed."""
    found = [open_artifact(paths.join(pieces_url(url, step), Part(index, count).name)) for index in range(count)]
    hashes = [artifact.manifest.files[TENSORS_NAME].digest for artifact in found]
    return {"count": count, "rows": dict(rows), "sha256": hashes}


def read_pieces(step: Artifact, wanted: Part | None) -> dict[str, torch.Tensor]:
    """A part of a checkpoint's tensors, or all of them whole; only pieces with rows of it are read, one at a time.

    Every byte that is read is checked. Raises CorruptArtifactError where the pieces are not those of the step.
    """
    count, rows, hashes = _description(step)
    whole = Part(0, 1, rows)
    wanted = whole if wanted is None else Part(wanted.index, wanted.count, rows)
    found: dict[str, list[torch.Tensor]] = {}
    for part in _needed([Part(index, count, rows) for index in range(count)], wanted):
        for name, tensor in _read(step, part, hashes[part.index]).items():
            if name not in rows:
                found.setdefault(name, [tensor.clone()])
                continue
            common = common_rows(part.span(name), wanted.span(name))
            found.setdefault(name, []).append(tensor[common].clone())
    return {name: torch.cat(tensors) if name in rows else tensors[0] for name, tensors in found.items()}


def _needed(parts: list[Part], wanted: Part) -> list[Part]:
    """Those with rows of what is wanted; one of them at the least, for what has no rows."""
    if len(parts) == wanted.count:
        return [parts[wanted.index]]
    found = [part for part in parts if any(_common(part.span(name), wanted.span(name)) for name in wanted.rows)]
    return found or parts[:1]


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), max(one.start, other.start, min(one.stop, other.stop)))


def _read(step: Artifact, part: Part, digest: str) -> dict[str, torch.Tensor]:
    return read_weight_file(_piece(step, part, digest), TENSORS_NAME)


def _piece(step: Artifact, part: Part, digest: str) -> Artifact:
    artifact = open_artifact(_place(step, part))
    if artifact.manifest.files[TENSORS_NAME].digest != digest:
        raise CorruptArtifactError(f"{artifact.url} must be a piece of {step.url}, but is of another; move both away")
    return artifact


def weight_parts(step: Artifact) -> list[tuple[Artifact, Part]]:
    """The artifacts that hold a step's tensors, in order, and which part of its rows each has."""
    if PIECES_NAME not in step.manifest.files:
        return [(step, Part(0, 1))]
    count, rows, hashes = _description(step)
    parts = [Part(index, count, rows) for index in range(count)]
    return [(_piece(step, part, digest), part) for part, digest in zip(parts, hashes, strict=True)]


def common_rows(one: range, other: range) -> slice:
    """Rows of a tensor that both have, counted from the first of `one`."""
    common = _common(one, other)
    return slice(common.start - one.start, common.start - one.start + len(common)) if common else slice(0, 0)


def _place(step: Artifact, part: Part) -> str:
    job, _, name = step.url.rstrip("/").rpartition("/")
    return paths.join(job, name.replace("step-", "pieces-", 1), part.name)


def pieces_of(step: Artifact) -> list[Artifact]:
    """The artifacts of a step's pieces; none where it is whole in itself."""
    if PIECES_NAME not in step.manifest.files:
        return []
    count = _description(step)[0]
    return [open_artifact(_place(step, Part(index, count))) for index in range(count)]


def _description(step: Artifact) -> tuple[int, dict[str, int], list[str]]:
    found = step.read_json(PIECES_NAME)
    try:
        count, rows, hashes = found["count"], found["rows"], found["sha256"]
        if type(count) is int and len(hashes) == count > 0 and all(type(number) is int for number in rows.values()):
            return count, rows, hashes
    except (TypeError, KeyError, AttributeError):
        pass
    raise CorruptArtifactError(
        f"{step.url} must say of how many pieces it is, but {PIECES_NAME} does not; move it away"
    )


def sweep_pieces(url: str, kept: set[int], before: float = math.inf) -> None:
    """Delete the pieces of steps before one, but of those that are `kept`."""
    for name in paths.list_folder(url):
        found = FOLDER_NAME.fullmatch(name)
        if found and int(found[1]) not in kept and int(found[1]) < before:
            paths.remove(paths.join(url, name))
