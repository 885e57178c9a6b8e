"""A mixture's layers by grouped products of stacked experts (`grouped_mm`), to be timed beside the sorted visits.

On a GPU it asks for no group's size, and so never waits; but it copies all experts into one stack in every step, and
those that nothing visits get gradients of zero. On one core it is as fast with few experts, and slower with many.
"""

# N tokens  V visits  D width  F FFN width  E experts  A active experts

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from modularforge.model.backbone import Decoder
from modularforge.model.moe import SparseMoE, moe_layers


def use_grouped(decoder: Decoder) -> Decoder:
    """The same decoder with grouped products in its mixture layers."""
    for layer in moe_layers(decoder):
        layer._visit = MethodType(visit, layer)  # type: ignore[method-assign]
    return decoder


def visit(layer: SparseMoE, x_ND: Tensor, weight_NA: Tensor, expert_NA: Tensor) -> Tensor:
    """What `SparseMoE._visit` returns."""
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    sorted_V, visit_V = expert_NA.flatten().sort(stable=True)
    numbers_E = torch.arange(len(layer.experts), device=x_ND.device)
    ends_E = torch.searchsorted(sorted_V, numbers_E, right=True).to(torch.int32)
    token_V, weight_V1 = visit_V // expert_NA.shape[1], weight_NA.flatten().gather(0, visit_V)[:, None]

    def product(values: Tensor, part: str) -> Tensor:
        stack_EFD = torch.stack([getattr(expert, part).weight for expert in layer.experts]).to(dtype)
        return F.grouped_mm(values, stack_EFD.transpose(1, 2), offs=ends_E)

    x_VD = x_ND[token_V].to(dtype)
    output_VD = product(F.silu(product(x_VD, "w1")) * product(x_VD, "w3"), "w2").to(x_ND.dtype)
    return torch.zeros_like(x_ND).index_add(0, token_V, output_VD * weight_V1)
