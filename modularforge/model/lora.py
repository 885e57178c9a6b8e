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

from checkpoints.tensors import LaterTensor
from modularforge.model import names
from modularforge.model.adapter_config import AdapterShape, check_fits, paired
from modularforge.model.backbone import Decoder
from modularforge.model.meta import without_weights
from modularforge.model.shards import host_tensors
from modularforge.model.sizes import AdapterCounts

PARTS = ("lora_A", "lora_B")


class LoraLinear(nn.Linear):
    """A matrix and what an adapter adds to it: scale · B A x.

    A new adapter adds nothing yet, and drops inputs while it trains; a `stored` one (A [R, I], B [O, R]) drops none.
    """

    def __init__(self, matrix: nn.Linear, shape: AdapterShape, stored: tuple[Tensor, Tensor] | None = None) -> None:
        with without_weights():
            super().__init__(matrix.in_features, matrix.out_features, bias=False)
            self.lora_A = nn.Linear(matrix.in_features, shape.rank, bias=False)
            self.lora_B = nn.Linear(shape.rank, matrix.out_features, bias=False)
        self.weight = matrix.weight
        self.scale, self.dropout = shape.scale, 0.0 if stored else shape.dropout
        a_RI, b_OR = stored or new_adapter(matrix, shape)
        self.lora_A.weight, self.lora_B.weight = nn.Parameter(a_RI.float()), nn.Parameter(b_OR.float())

    def forward(self, x: Tensor) -> Tensor:
        """The matrix's output [..., O] of inputs [..., I], in its own type."""
        output = F.linear(x, self.weight)
        inputs = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        added: Tensor = self.lora_B(self.lora_A(inputs)) * self.scale
        return (output + added).to(output.dtype)


def new_adapter(matrix: nn.Linear, shape: AdapterShape) -> tuple[Tensor, Tensor]:
    """A and B as PEFT starts them: B is zero, and A is drawn from torch's global generator."""
    a_RI = nn.init.kaiming_uniform_(torch.empty(shape.rank, matrix.in_features), a=math.sqrt(5))
    return a_RI, torch.zeros(matrix.out_features, shape.rank)


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
    return {name: weight for name, weight in decoder.named_parameters() if is_adapter(name)}


def is_adapter(name: str) -> bool:
    """Whether that is the name of an adapter's parameter."""
    return name.split(".")[-2] in PARTS


def adapter_tensors(decoder: Decoder) -> dict[str, Tensor | LaterTensor]:
    """The adapters as PEFT stores them."""
    return {names.adapter(name): weight for name, weight in host_tensors(adapter_parameters(decoder)).items()}


def with_adapter(decoder: Decoder, shape: AdapterShape, tensors: Mapping[str, Tensor], origin: str) -> Decoder:
    """The decoder with a stored adapter beside its matrices; raises MismatchError when it is of another base.

    An adapter need not stand beside every layer.
    """
    pairs, matrices = fitting_pairs(decoder, shape, tensors, origin), dict(_matrices(decoder))
    for name, pair in pairs.items():
        place = name.removesuffix(".weight")
        decoder.set_submodule(place, LoraLinear(matrices[place], shape, pair))
    decoder.adapters = AdapterCounts((sum(tensor.numel() for pair in pairs.values() for tensor in pair),), 1, 1)
    return decoder.requires_grad_(False)


def fitting_pairs(
    decoder: Decoder, shape: AdapterShape, tensors: Mapping[str, Tensor], origin: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] of a stored adapter by the name of their matrix; raises MismatchError for another base."""
    pairs, matrices = paired(tensors, origin), {f"{place}.weight": matrix for place, matrix in _matrices(decoder)}
    for name, (a_RI, b_OR) in pairs.items():
        matrix = tuple(matrices[name].weight.shape) if name in matrices else None
        check_fits(origin, name, tuple(a_RI.shape), tuple(b_OR.shape), matrix, shape.rank)
    return pairs


def _matrices(decoder: Decoder) -> list[tuple[str, nn.Linear]]:
    """The projections of all layers by their place, in order."""
    return [
        (f"model.layers.{index}.{place}", module)
        for index, block in enumerate(decoder.blocks)
        for place, module in block.named_modules()
        if isinstance(module, nn.Linear) and place.startswith(("self_attn.", "mlp.")) and place.endswith("_proj")
    ]
