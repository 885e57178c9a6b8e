"""Batches that are there before the GPU asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from modularforge.data.background import in_background
from modularforge.tasks.task import Batch


@contextmanager
def built_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    """The same batches in the same order; for a GPU two ahead, made by a thread, in pinned memory.

    Where a job goes on is said by the batch that it took, so none that was made and not taken is lost. On a CPU they
    are as they were: there the thread would only take the time of what trains.
    """
    if device.type != "cuda":
        yield batches
        return
    with closing(in_background(_pinned(batch) for batch in batches)) as ahead:  # type: ignore[type-var]
        yield ahead


def _pinned(batch: Batch) -> Batch:
    """The batch where a GPU can copy it from by itself."""
    tensors = {name: tensor.pin_memory() for name, tensor in batch.tensors.items()}
    return Batch(tensors, batch.position, batch.units)
