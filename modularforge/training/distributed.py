"""The world: which process this is, how many there are, and the few collectives that training needs.

torchrun describes the world in the environment (`modularforge/ranks.py` reads it); without it the world is one process.
"""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from modularforge.ranks import own_rank, remove_empty_scratch

# A rank that died is noticed by the others after so long. They also wait here while rank 0 alone gathers statistics and
# commits, so a much shorter one would end healthy jobs.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


# How DDP is told to leave buffers alone; where there is the newer word, the older one is a warning in every log.
_WORDS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
LEAVE_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _WORDS else "broadcast_buffers": False
}


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """Sum of each value over all ranks (called on every rank, with lists of one length)."""
        if self.size == 1:
            return values
        # On the CPU, through gloo: asking a GPU at every step would make the host wait for it.
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        summed: list[float] = tensor.tolist()
        return summed

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.total([0.0])


@contextmanager
def joined_world(device: torch.device | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on CPU, nccl on GPU), and leave at the end."""
    rank, local_rank, size = own_rank()
    device = device or default_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        remove_empty_scratch()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, device, control)
    finally:
        dist.destroy_process_group()
        remove_empty_scratch()


def default_device(local_rank: int = 0) -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def parallelise(
    model: nn.Module, world: World, may_skip_parameters: bool = False, sends_half: bool = False
) -> nn.Module:
    """Wrap a model in DDP when there is more than one rank; gradients are then averaged over ranks, or what bf16 keeps
    of them.

    With `may_skip_parameters`, a rank's batch may leave some without a gradient; looking for them costs a little.
    """
    if world.size == 1:
        return model
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=may_skip_parameters,
        # Buffers are tables and rotary frequencies, which are the same everywhere.
        **LEAVE_BUFFERS,
    )
    if sends_half:
        # By its own name torch refuses it without NCCL; gloo adds bf16 as well.
        hook = lambda group, bucket: bf16_compress_hook(group, bucket)  # noqa: E731
        wrapped.register_comm_hook(None, hook)
    return wrapped
