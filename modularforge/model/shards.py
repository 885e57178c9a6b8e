"""A model whose weights lie in pieces on several ranks (FSDP), used as if all of it lay on one.

A forward pass of such a model, and each tensor that is to be whole, are the work of all ranks. What one rank does
alone, as rank 0 writes artifacts and gathers sums, or does more often than others, as validation in uneven shares, it
does `in_company`: it tells the others before, and who has nothing left to do runs along until all are done. So no rank
ever holds more than one block of the others; a tensor that one wants whole is whole there alone, and the others send it
their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints.tensors import LaterTensor

Total = Callable[[list[float]], list[float]]
"""Sums over all ranks, called on every rank."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has only a piece of a tensor."""
    return hasattr(tensor, "full_tensor")


def own_piece(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: rows of it, or all."""
    found: Any = tensor
    piece: Tensor = found.to_local() if is_sharded(tensor) else tensor
    return piece


def like_piece(piece: Tensor, tensor: Any) -> Tensor:
    """This rank's piece of a tensor that lies in pieces as another does."""
    from torch.distributed.tensor import DTensor

    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(piece, tensor.device_mesh, tensor.placements, run_check=False, **shape)


def host_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor | LaterTensor]:
    """Weights on the host, by their names in the model; those in pieces are made whole when they are written."""
    return {
        name: LaterTensor(tuple(weight.shape), weight.dtype, partial(_whole, name))
        if is_sharded(weight)
        else weight.detach().cpu().contiguous()
        for name, weight in named.items()
    }


@torch.no_grad()
def gathered(tensor: Any, wanted_by: int) -> Tensor | None:
    """A tensor in pieces as a whole on the host of one rank, None on all others (called on every rank).

    They send their rows and hold nothing of others. With `hsdp` the group of that rank has all rows, and the other
    groups nothing to do. Pieces are rows, as `fully_shard` cuts them: the same number on each rank but for the last.
    """
    mesh = tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    ranks = dist.get_process_group_ranks(group)
    if wanted_by not in ranks:
        return None
    own, rows = own_piece(tensor).detach(), -(-len(tensor) // len(ranks))
    piece = own.contiguous() if len(own) == rows else torch.cat([own, own.new_zeros(rows - len(own), *own.shape[1:])])
    if dist.get_rank() != wanted_by:
        dist.gather(_bytes(piece), dst=wanted_by, group=group)
        return None
    whole = own.new_empty(rows * len(ranks), *own.shape[1:])
    dist.gather(_bytes(piece), list(_bytes(whole).chunk(len(ranks))), dst=wanted_by, group=group)
    return whole[: len(tensor)].cpu()


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory, which every backend can send whatever it stands for."""
    return tensor.view(-1).view(torch.uint8)


class _Company:
    """The ranks of one model, and what they are told: (ranks that run forward, number of a tensor that one wants, its
    rank).
    """

    def __init__(self, model: nn.Module, total: Total, further: Mapping[str, Tensor]) -> None:
        self.model, self.total, self.runs_along = model, total, False
        pieces = {name: tensor for name, tensor in further.items() if is_sharded(tensor)}
        self.weights = {**dict(model.named_parameters(remove_duplicate=False)), **pieces}
        self.numbers = {name: number for number, name in enumerate(self.weights, start=1)}

    def before_forward(self, *_: object) -> None:
        """Tell the others, unless they have told this rank."""
        if not self.runs_along:
            self.total([1.0, 0.0, 0.0])

    def whole(self, name: str) -> Tensor:
        """A weight, on this rank's host."""
        rank = dist.get_rank()
        self.total([0.0, float(self.numbers[name]), float(rank)])
        whole = gathered(self.weights[name], rank)
        assert whole is not None
        return whole

    def attend(self) -> None:
        """Run along until no rank has anything left to do."""
        names, self.runs_along = list(self.weights), True
        while any(told := self.total([0.0, 0.0, 0.0])):
            if told[1]:
                gathered(self.weights[names[int(told[1]) - 1]], int(told[2]))
            else:
                self._run_along()
        self.runs_along = False

    @torch.no_grad()
    def _run_along(self) -> None:
        """Take part in a forward pass with one token, whose outcome nobody wants."""
        device = next(iter(self.weights.values())).device
        self.model(torch.zeros(1, 1, dtype=torch.int64, device=device), headless=True)


_COMPANY: list[_Company] = []


@contextmanager
def in_company(model: nn.Module, total: Total, further: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """What ranks do here with a sharded model need not be alike (called on every rank); nothing for any other model.

    `further` tensors may be made whole here too, beside the model's own.
    """
    _close(model)
    if not any(map(is_sharded, model.parameters())):
        yield
        return
    company = _Company(model, total, further or {})
    hook = model.register_forward_pre_hook(company.before_forward, prepend=True)
    _COMPANY.append(company)
    try:
        yield
        company.attend()
    finally:
        _COMPANY.pop()
        hook.remove()
        _close(model)


def _close(model: nn.Module) -> None:
    """Let go of the pieces of others, which the outermost module keeps after a forward pass."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def _whole(name: str) -> Tensor:
    return _COMPANY[-1].whole(name)
