"""From the encoder's frames to the language model's width: pooling along time, and the projector."""

# B batch  T frames  D encoder width  W language model's width  k frames of a window

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

PoolingKind = Literal["stack", "mean", "max"]
LOWEST = -1e30


@dataclass(frozen=True)
class Pooling:
    """Windows of `kernel` frames become one: `stack` joins them, `mean` and `max` are over those that are there.

    It is done behind encoder layer `layer` (0 is before the first), or behind the final norm where that is null.
    """

    kernel: int = 4
    kind: PoolingKind = "stack"
    layer: int | None = None

    @property
    def widening(self) -> int:
        """How many times as wide its output is as its input."""
        return self.kernel if self.kind == "stack" else 1


def pooled_lengths(length_B: Tensor, kernel: int) -> Tensor:
    """Windows of utterances of so many frames; the last one may be partly filled."""
    return (length_B + kernel - 1) // kernel


def pool(x_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Windows [B, ceil(T / k), D or D k]; frames that are not there count as zeros in a stack, and not at all else."""
    missing = -x_BTD.shape[1] % pooling.kernel
    mask_BT1 = F.pad(mask_BT, (0, missing))[..., None]
    x_BTD = F.pad(x_BTD, (0, 0, 0, missing)) * mask_BT1
    if pooling.kind == "stack":
        return x_BTD.reshape(x_BTD.shape[0], -1, pooling.kernel * x_BTD.shape[2])
    windows = (x_BTD.shape[0], -1, pooling.kernel, x_BTD.shape[2])
    x_BTkD, mask_BTk1 = x_BTD.reshape(windows), mask_BT1.reshape(*windows[:3], 1)
    if pooling.kind == "mean":
        return x_BTkD.sum(dim=2) / mask_BTk1.sum(dim=2).clamp(min=1)
    return x_BTkD.masked_fill(~mask_BTk1, LOWEST).amax(dim=2).masked_fill(~mask_BTk1.any(dim=2), 0.0)


class Projector(nn.Module):
    """LayerNorm and two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, output: int, output_rms: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, output)
        # A language model reads embeddings of a certain size; what the audio becomes starts near it.
        nn.init.normal_(self.fc2.weight, std=output_rms / (0.36 * hidden**0.5 + 1e-6))
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map each window on its own."""
        output_BTW: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x_BTD))))
        return output_BTW
