"""Lets all ranks of a job succeed or fail together: a failure of one is raised on every rank in bounded time.

The caller passes `torch.distributed`, so nothing here decides how ranks talk. A rank that died, or hangs longer than
the process group's timeout, ends the exchange with an error of the process group on the others. No pickle is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from checkpoints.errors import StoreError
from checkpoints.pieces import Part
from checkpoints.training import Checkpoint, list_checkpoints, load_checkpoint, load_newest_checkpoint, step_of

Result = TypeVar("Result")
NO_CHECKPOINT = -1


def together(action: Callable[[], Result], distributed: Any, device: torch.device | str = "cpu") -> Result:
    """Run `action` (called on every rank) and return its result; if it fails on any rank, every rank raises.

    The rank that failed raises its own error, the others a StoreError that names the rank and its message. `device` is
    where the process group exchanges tensors: the GPU with a group that is NCCL only.
    """
    error: Exception | None = None
    results: list[Result] = []
    try:
        results.append(action())
    except Exception as caught:
        error = caught
    message = f"{type(error).__name__}: {error}".encode() if error else b""
    lengths = _gather(len(message), distributed, device)
    failed = next((rank for rank, length in enumerate(lengths) if length), None)
    if failed is None:
        return results[0]
    text = _broadcast(message, lengths[failed], failed, distributed, device)
    if error:
        raise error
    raise StoreError(f"rank {failed} of {len(lengths)} failed, so all stop: {text}")


def on_rank_zero(action: Callable[[], object], distributed: Any, device: torch.device | str = "cpu") -> None:
    """Run `action` on rank 0 only (called on every rank); when it fails, every rank raises."""
    together(action if distributed.get_rank() == 0 else _nothing, distributed, device)


def load_newest_on_all_ranks(
    url: str,
    fingerprint: str,
    distributed: Any,
    device: torch.device | str = "cpu",
    fallback: bool = False,
    part: Part | None = None,
) -> Checkpoint | None:
    """The same checkpoint on every rank (called on every rank): rank 0 chooses the step, then each reads its part."""
    chosen: list[Checkpoint | None] = [None]

    def choose() -> None:
        chosen[0] = load_newest_checkpoint(url, fingerprint, fallback, part)

    on_rank_zero(choose, distributed, device)
    mine = chosen[0].step if chosen[0] else NO_CHECKPOINT
    step = _gather(mine, distributed, device)[0]
    if step == NO_CHECKPOINT:
        return None
    return together(lambda: chosen[0] or _load_step(url, step, fingerprint, part), distributed, device)


def _load_step(url: str, step: int, fingerprint: str, part: Part | None) -> Checkpoint:
    names = {step_of(name): name for name in list_checkpoints(url)}
    if step not in names:
        raise StoreError(f"{url} must show step {step} on every rank, but shows {sorted(names)}; use shared storage")
    return load_checkpoint(f"{url.rstrip('/')}/{names[step]}", fingerprint, part)


def _gather(value: int, distributed: Any, device: torch.device | str) -> list[int]:
    """One number of every rank, on every rank."""
    values = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(values, torch.tensor([value], dtype=torch.int64, device=device))
    return [int(item) for item in values]


def _broadcast(message: bytes, length: int, source: int, distributed: Any, device: torch.device | str) -> str:
    """The message of one rank, on every rank."""
    content = message if distributed.get_rank() == source else bytes(length)
    text = torch.tensor(list(content), dtype=torch.uint8, device=device)
    distributed.broadcast(text, src=source)
    return bytes(text.cpu().tolist()).decode(errors="replace")


def _nothing() -> None:
    return None
