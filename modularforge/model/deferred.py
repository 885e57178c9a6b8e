"""Models on the meta device, and how their weights come to be: drawn or read one after another, each put in its place
before the next, so that where weights lie in pieces no process ever holds more of the others' than one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.errors import MismatchError
from modularforge.model.backbone import Decoder, draw
from modularforge.model.meta import without_weights
from modularforge.model.shards import is_sharded, own_piece

Weights = Mapping[str, Callable[[], Tensor]]
"""What makes each weight of a model, in the order in which they are to be made."""


@dataclass(frozen=True)
class Deferred:
    """A decoder on the meta device, with the types that its weights shall have, and what makes them."""

    model: Decoder
    weights: Weights

    def whole(self) -> Decoder:
        """The model with all of its weights, on the host."""
        settle(self.model, self.weights, torch.device("cpu"))
        return self.model


def drawn(build: Callable[[], Decoder], layers: int) -> Deferred:
    """The model that `build` makes without the weights that it draws from torch's global generator: it is left where
    drawing all of them would leave it, and the weights are the same.
    """
    with without_weights(draws_in_vain=True):
        decoder = build()
    return Deferred(decoder, {name: drawn_weight(name, weight, layers) for name, weight in decoder.named_parameters()})


def read(decoder: Decoder, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Deferred:
    """A decoder on the meta device that is to have these tensors, in one type or each in its own."""
    for name, weight in decoder.named_parameters():
        if dtype or name in tensors:
            weight.data = weight.data.to(dtype or tensors[name].dtype)
    return Deferred(decoder, {name: partial(_itself, tensor) for name, tensor in tensors.items()})


def drawn_weight(name: str, weight: Tensor, layers: int) -> Callable[[], Tensor]:
    """What makes a weight of a new model, of the shape of this one."""
    shape = weight.shape
    return lambda: draw(torch.ones(shape), name, layers)


def settle(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Give a model on the meta device its weights, one after another; of one in pieces, this process's rows alone.

    What requires gradients gets memory of its own. Raises MismatchError naming what does not fit.
    """
    named = dict(model.named_parameters())
    _check(weights, {name: tuple(weight.shape) for name, weight in named.items()})
    if any(map(is_sharded, named.values())):
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
    for name, make in weights.items():
        weight, tensor = named[name], make()
        if tensor.shape != weight.shape:
            raise MismatchError(_unlike(name, tuple(weight.shape), tuple(tensor.shape)))
        if is_sharded(weight):
            own_piece(weight.detach()).copy_(own_rows_of(tensor, weight))
            continue
        found = tensor.to(device, weight.dtype)
        is_same = found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        found = found.clone() if weight.requires_grad and is_same else found
        torch.utils.swap_tensors(weight, nn.Parameter(found, requires_grad=weight.requires_grad))  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, Decoder):
            module.restore_positions()


def own_rows_of(whole: Tensor, weight: Any) -> Tensor:
    """This process's piece of a tensor that all have as a whole, as a weight's lies."""
    from torch.distributed.tensor import distribute_tensor

    return own_piece(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))


def _check(found: Collection[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    if wrong := sorted(expected.keys() ^ set(found)):
        what = "is missing" if wrong[0] in expected else "is left over"
        raise MismatchError(
            f"weights must be those that the model has, but {wrong[0]} {what} ({len(wrong)} differ); use files of one "
            "model"
        )


def _unlike(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    return f"{name} must have shape {expected}, but in the weights it has {found}; use files of one model"


def _itself(tensor: Tensor) -> Tensor:
    return tensor
