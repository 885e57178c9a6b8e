"""Ranks that read the tensors of a checkpoint once between them, each a share, and hand them to each other.

So a job of many ranks asks the store for each byte once, whatever the layout in which it was written and goes on. Of a
weight file the header is read by all, and of tensors, those of one's share by their ranges, each compared with its
hash. What a rank holds on the way is its share, one tensor of another, and what it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from checkpoints import digests
from checkpoints.artifact import Artifact
from checkpoints.errors import CorruptArtifactError, DataError
from checkpoints.pieces import TENSORS_NAME, Part, common_rows
from checkpoints.safetensors import TensorSpan, read_spans
from checkpoints.streams import check_size, stream_span
from checkpoints.tensors import DTYPES


class Unit(NamedTuple):
    """One tensor of one weight file, the rows that the file has of it, and which rank reads it."""

    name: str
    part: Part
    span: TensorSpan
    reader: int


@dataclass(frozen=True)
class Shares:
    """All tensors of a checkpoint, and the bytes of those that this rank has read, by number."""

    units: Sequence[Unit]
    own: dict[int, torch.Tensor]

    def exchanged(
        self, wanted: Part | None, distributed: Any, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """A part of each tensor, or all of it (called on every rank); tensor by tensor each reader gives it to all."""
        found: dict[str, list[torch.Tensor]] = {}
        for number, unit in enumerate(self.units):
            content = self.own.pop(number, None)
            if content is None:
                content = torch.empty(unit.span.length, dtype=torch.uint8)
            if unit.span.length:
                moved = content.to(device)
                distributed.broadcast(moved, src=unit.reader)
                content = moved.cpu()
            tensor = content.view(DTYPES[unit.span.dtype]).reshape(unit.span.shape)
            found.setdefault(unit.name, []).append(tensor[_rows(unit, wanted)].clone() if tensor.dim() else tensor)
        return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in found.items()}


def read_share(files: Sequence[tuple[Artifact, Part]], rank: int, ranks: int) -> Shares:
    """What a rank reads of weight files; raises CorruptArtifactError where a byte differs."""
    units = _divided(files, ranks)
    return Shares(units, {number: _read(unit.span) for number, unit in enumerate(units) if unit.reader == rank})


def _divided(files: Sequence[tuple[Artifact, Part]], ranks: int) -> list[Unit]:
    """All tensors, what each file has alike once; the largest first, each goes to the rank that has least to read."""
    found = [
        (name, part, span)
        for artifact, part in files
        for name, span in _spans(artifact).items()
        if name in part.rows or part.index == 0
    ]
    loads, readers = [0] * ranks, dict[int, int]()
    for number in sorted(range(len(found)), key=lambda number: (-found[number][2].length, number)):
        readers[number] = loads.index(min(loads))
        loads[readers[number]] += found[number][2].length
    return [Unit(*unit, readers[number]) for number, unit in enumerate(found)]


def _spans(artifact: Artifact) -> dict[str, TensorSpan]:
    entry, url = artifact.entry(TENSORS_NAME), artifact.file_url(TENSORS_NAME)
    check_size(url, entry)
    try:
        spans = read_spans(url, entry.tensors, entry.size)
    except DataError as error:
        raise CorruptArtifactError(str(error)) from error
    unknown = sorted({span.dtype for span in spans.values()} - {*DTYPES})
    if unknown or spans.keys() != entry.tensors.keys():
        raise CorruptArtifactError(f"{url} must have the tensors that its manifest names, but has not; make it again")
    return dict(sorted(spans.items()))


def _read(span: TensorSpan) -> torch.Tensor:
    content, digest, position = torch.empty(span.length, dtype=torch.uint8), digests.like(span.digest), 0
    target: Any = content.numpy()
    for chunk in stream_span(span.url, span.start, span.start + span.length):
        digest.update(chunk)
        memoryview(target)[position : position + len(chunk)] = chunk
        position += len(chunk)
    if position != span.length or digest.text() != span.digest:
        raise CorruptArtifactError(
            f"{span.url} must have the bytes that its manifest names, but tensor bytes {span.start} to "
            f"{span.start + span.length} differ; restore it from a copy, or delete the artifact and make it again"
        )
    return content


def _rows(unit: Unit, wanted: Part | None) -> slice:
    """Rows of a file's part of a tensor that are wanted."""
    if wanted is None or unit.name not in wanted.rows:
        return slice(None)
    rows = Part(0, 1, wanted.rows).span(unit.name)
    held = unit.part.span(unit.name) if unit.name in unit.part.rows else rows
    return common_rows(held, wanted.span(unit.name))
