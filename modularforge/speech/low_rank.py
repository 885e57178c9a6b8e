"""Low-rank adapters (arXiv 2106.09685) beside the matrices of a frozen speech encoder: the variant `lora`.

Adapters of several experts stand beside each other; what each adds is weighed as steering experts are, by what the
encoder hears before the layer that they adapt.
"""

# B batch  T frames  I inputs of a matrix  O its outputs  K experts  R rank of one expert

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modularforge.model.adapter_config import AdapterShape
from modularforge.model.lora import new_adapter
from modularforge.speech.steering import ExpertWeights, SteeringShape

WHISPER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
CONFORMER_TARGETS = ("linear_q", "linear_k", "linear_v", "linear_out", "intermediate_dense", "output_dense")
TARGETS = WHISPER_TARGETS + CONFORMER_TARGETS
ALPHA_PER_RANK = 2.0


@dataclass
class Mixture:
    """How much each expert weighs in the layer that runs now, [B, T, K] or [B, 1, K]; None where there is but one."""

    weight_BTK: Tensor | None = None


class Adapter(nn.Module):
    """What low-rank matrices A [K R, I] and B [O, K R] of all experts add to a linear layer; nothing at the start."""

    def __init__(self, linear: nn.Linear, rank: int, experts: int, mixture: Mixture) -> None:
        super().__init__()
        pairs = [new_adapter(linear, AdapterShape(rank, ALPHA_PER_RANK * rank, ())) for _ in range(experts)]
        self.lora_A = nn.Parameter(torch.cat([a_RI for a_RI, _ in pairs]))
        self.lora_B = nn.Parameter(torch.cat([b_OR for _, b_OR in pairs], dim=1))
        self.rank, self.mixture = rank, mixture

    def add(self, _linear: nn.Module, inputs: tuple[Any, ...], output_BTO: Tensor) -> Tensor:
        """The layer's output and what the adapters add; a forward hook of the layer."""
        inner_BTR = F.linear(inputs[0], self.lora_A)
        if self.mixture.weight_BTK is not None:
            inner_BTR = inner_BTR * self.mixture.weight_BTK.repeat_interleave(self.rank, dim=-1)
        return output_BTO + ALPHA_PER_RANK * F.linear(inner_BTR, self.lora_B)

    def squares_K(self, experts: int) -> Tensor:
        """Squared Frobenius norm of each expert's B A, scaled: the trace of (B^T B)(A A^T)."""
        a_KRI = self.lora_A.detach().float().view(experts, self.rank, -1)
        b_OKR = self.lora_B.detach().float().view(-1, experts, self.rank)
        inner_KRR = torch.einsum("okr,oks->krs", b_OKR, b_OKR) * (a_KRI @ a_KRI.mT)
        return (ALPHA_PER_RANK**2 * inner_KRR.sum(dim=(1, 2))).cpu()


class LowRank(ExpertWeights):
    """Adapters beside q, k, v, out and the feed-forward matrices of every layer; sites are the layers' inputs."""

    def __init__(self, shape: SteeringShape, rank: int, encoder: nn.Module) -> None:
        super().__init__(shape)
        self.mixture, self.adapters = Mixture(), nn.ModuleDict()
        for name, linear in adapted(encoder):
            adapter = Adapter(linear, rank, shape.experts, self.mixture)
            linear.register_forward_hook(adapter.add)
            self.adapters[name.replace(".", "-")] = adapter

    def forward(self, site: int, u_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The layer's input as it is, after it was decided how much each expert weighs in the layer."""
        if self.shape.experts > 1:
            self.mixture.weight_BTK = self.expert_weights(site, u_BTD.float(), mask_BT)
            self.observe(site, self.mixture.weight_BTK.expand(*u_BTD.shape[:2], -1), mask_BT)
        else:
            self.observe(site, u_BTD.new_ones(*u_BTD.shape[:2], 1), mask_BT)
        return u_BTD

    def lengths_LE(self) -> Tensor:
        """Frobenius norms of what each expert's adapters add to the matrices of a layer, B A, all of them together."""
        square_LE = torch.zeros(self.shape.sites, self.shape.experts)
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            layer = int(name.partition("layers-")[2].partition("-")[0])
            square_LE[layer] += adapter.squares_K(self.shape.experts)
        return square_LE.sqrt()


def adapted(encoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The encoder's matrices that get an adapter, by their place in it."""
    for name, module in encoder.named_modules():
        is_in_layer = name.removeprefix("model.encoder.").startswith("layers.")
        if is_in_layer and isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            yield name, module
