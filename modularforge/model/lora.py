"""Low-rank adapters beside frozen matrices of a decoder (LoRA, arXiv 2106.09685), as PEFT computes them.

An adapted matrix keeps its name, so that a decoder with adapters has the backbone's tensors and a few more; the
adapters are float32 beside a backbone of any type.
"""

# R rank  I inputs of a matrix  O its outputs

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modularforge.errors import MismatchError
from modularforge.model import names
from modularforge.model.adapter_config import AdapterShape
from modularforge.model.backbone import Decoder

PARTS = ("lora_A", "lora_B")


class LoraLinear(nn.Linear):
    """A matrix and what an adapter adds to it: scale · B A x, with dropout on x while it trains."""

    def __init__(self, matrix: nn.Linear, shape: AdapterShape) -> None:
        with torch.device("meta"):
            super().__init__(matrix.in_features, matrix.out_features, bias=False)
        self.weight = matrix.weight
        self.scale, self.dropout = shape.scale, shape.dropout
        self.lora_A = nn.Linear(matrix.in_features, shape.rank, bias=False)
        self.lora_B = nn.Linear(shape.rank, matrix.out_features, bias=False)
        # PEFT's start: it adds nothing yet, and A is drawn from torch's global generator.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The matrix's output [..., O] of inputs [..., I], in its own type."""
        output = F.linear(x, self.weight)
        inputs = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        added: Tensor = self.lora_B(self.lora_A(inputs)) * self.scale
        return (output + added).to(output.dtype)


def add_adapters(decoder: Decoder, shape: AdapterShape) -> dict[str, nn.Parameter]:
    """Put a new adapter beside each matrix that the shape names; freezes all else and returns the adapters' parameters.

    Names are those of the decoder: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    """
    decoder.requires_grad_(False)
    for place, matrix in _matrices(decoder):
        if place.rsplit(".", 1)[-1] in shape.modules:
            decoder.set_submodule(place, LoraLinear(matrix, shape))
    return adapter_parameters(decoder)


def adapter_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """The parameters of a decoder's adapters by name."""
    return {name: weight for name, weight in decoder.named_parameters() if name.split(".")[-2] in PARTS}


def adapter_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The adapters as PEFT stores them."""
    return {
        names.adapter(name): weight.detach().cpu().contiguous() for name, weight in adapter_parameters(decoder).items()
    }


def with_adapter(decoder: Decoder, shape: AdapterShape, tensors: Mapping[str, Tensor], origin: str) -> Decoder:
    """The decoder with a stored adapter beside its matrices; raises MismatchError when it is of another base.

    An adapter need not stand beside every layer.
    """
    found = paired(tensors, origin)
    matrices = {f"{place}.weight": matrix for place, matrix in _matrices(decoder)}
    for name, (a_RI, b_OR) in found.items():
        check_fits(origin, name, a_RI.shape, b_OR.shape, matrices[name].weight.shape if name in matrices else None)
        adapted = LoraLinear(matrices[name], shape)
        adapted.lora_A.weight.data, adapted.lora_B.weight.data = a_RI.float(), b_OR.float()
        decoder.set_submodule(name.removesuffix(".weight"), adapted)
    return decoder.requires_grad_(False).eval()  # nothing is dropped


def paired(tensors: Mapping[str, Tensor], origin: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of an adapter by the name of their matrix, in order of names; raises MismatchError."""
    found: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in sorted(tensors.items()):
        place = names.adapted(stored)
        if place is None:
            raise MismatchError(
                f"{origin} must hold A and B of adapters on projections of a decoder, but has {stored}; choose an "
                "adapter of the backbone that the run has"
            )
        found.setdefault(place[0], {})[place[1]] = tensor
    for name, pair in found.items():
        if len(pair) < 2:
            raise MismatchError(f"{origin} must hold A and B of every adapter, but has one for {name}; save it again")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def check_fits(origin: str, name: str, a: tuple[int, ...], b: tuple[int, ...], matrix: tuple[int, ...] | None) -> None:
    """Raise MismatchError unless an adapter's A and B have the shapes that stand beside a matrix."""
    if matrix is None or len(a) != 2 or len(b) != 2 or (b[0], a[1]) != tuple(matrix) or a[0] != b[1]:
        there = "has no such matrix" if matrix is None else f"has {tuple(matrix)}"
        raise MismatchError(
            f"{origin} must be an adapter of this backbone, but for {name} it has {tuple(b)} times {tuple(a)}, and the "
            f"backbone {there}; use the model that the adapter was trained on"
        )


def _matrices(decoder: Decoder) -> list[tuple[str, nn.Linear]]:
    """The projections of all layers by their place, in order."""
    return [
        (f"model.layers.{index}.{place}", module)
        for index, block in enumerate(decoder.blocks)
        for place, module in block.named_modules()
        if isinstance(module, nn.Linear) and place.startswith(("self_attn.", "mlp.")) and place.endswith("_proj")
    ]
