"""Low-rank adapters (arXiv 2106.09685) in a frozen speech encoder: the variant `lora`, a baseline."""

# D input width  O output width  R rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ALPHA_PER_RANK = 2.0


class LowRankLinear(nn.Module):
    """A frozen linear layer and what an adapter adds to it; nothing at the start."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Both parts."""
        added_BTO = F.linear(F.linear(x_BTD, self.lora_A), self.lora_B)
        output_BTO: Tensor = self.linear(x_BTD) + ALPHA_PER_RANK * added_BTO
        return output_BTO


def add_low_rank(encoder: nn.Module, rank: int) -> None:
    """Put an adapter beside q, k, v, out, fc1 and fc2 of every layer."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS and isinstance(child, nn.Linear):
                setattr(parent, name, LowRankLinear(child, rank))
