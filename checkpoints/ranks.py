"""Lets all ranks of a job succeed or fail together: a failure of one is raised on every rank in bounded time.

The caller passes `torch.distributed`, so nothing here decides how ranks talk. A rank that died, or hangs longer than
the process group's timeout, ends the exchange with an error of the process group on the others. No pickle is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from checkpoints.errors import CorruptArtifactError, MissingArtifactError, StoreError
from checkpoints.pieces import Part, weight_parts
from checkpoints.sharing import Shares, read_share
from checkpoints.training import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_that_loads,
    open_checkpoint,
)

Result = TypeVar("Result")


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
    """The newest checkpoint that loads, on every rank its part (called on every rank).

    Rank 0 says which there are. No byte of tensors is read twice where ranks read in another layout than was written.
    """
    names: list[str] = []

    def look() -> None:
        if distributed.get_rank() == 0:
            names.extend(list_checkpoints(url))

    together(look, distributed, device)
    names = _from_rank_zero("\n".join(names), distributed, device).split()
    load = partial(_load_between, fingerprint=fingerprint, part=part, distributed=distributed, device=device)
    return newest_that_loads(url, names, load, fallback, is_main=distributed.get_rank() == 0)


def _load_between(
    url: str, fingerprint: str, part: Part | None, distributed: Any, device: torch.device | str
) -> Checkpoint:
    """One checkpoint (called on every rank): each reads a share of it once, and gets what it needs of the others'.

    A rank whose own piece lies there as it is reads that alone. Raises CorruptArtifactError on all ranks when it is
    damaged on one.
    """
    damaged: list[str] = []
    read: list[tuple[Checkpoint, Shares | None]] = []

    def read_own() -> None:
        try:
            read.append(_read_own(url, fingerprint, part, distributed))
        except MissingArtifactError as error:
            raise StoreError(f"{url} must be there on every rank, but is not ({error}); use shared storage") from error
        except CorruptArtifactError as error:
            damaged.append(str(error))

    together(read_own, distributed, device)
    if message := _first_message("".join(damaged), distributed, device):
        raise CorruptArtifactError(message)
    checkpoint, shares = read[0]
    if shares is None:
        return checkpoint
    return replace(checkpoint, tensors=shares.exchanged(part, distributed, device))


def _read_own(url: str, fingerprint: str, part: Part | None, distributed: Any) -> tuple[Checkpoint, Shares | None]:
    artifact, step, state = open_checkpoint(url, fingerprint)
    parts = weight_parts(artifact)
    if part is not None and len(parts) == part.count:
        return load_checkpoint(url, fingerprint, part), None
    return Checkpoint(step, {}, state), read_share(parts, distributed.get_rank(), distributed.get_world_size())


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


def _from_rank_zero(text: str, distributed: Any, device: torch.device | str) -> str:
    message = text.encode()
    return _broadcast(message, _gather(len(message), distributed, device)[0], 0, distributed, device)


def _first_message(text: str, distributed: Any, device: torch.device | str) -> str:
    """What the first rank says that says anything, on every rank."""
    message = text.encode()
    lengths = _gather(len(message), distributed, device)
    speaker = next((rank for rank, length in enumerate(lengths) if length), None)
    return "" if speaker is None else _broadcast(message, lengths[speaker], speaker, distributed, device)


def _nothing() -> None:
    return None
