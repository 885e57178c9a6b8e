"""What gates see while a model runs: sums per site over frames, and over the means of utterances.

Jobs that were trained apart leave these sums, from which a router among them is solved without any of their audio.
"""

# B batch  T frames  N frames that are there  D width  L sites

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modularforge.routing.statistics import LayerStatistics, RouterStatistics
from modularforge.speech.encoder import frame_mask
from modularforge.speech.model import SpeechModel
from modularforge.speech.steering import masked_mean


@dataclass(frozen=True)
class SpeechSums:
    """Router statistics over frames and over utterances."""

    frames: RouterStatistics
    utterances: RouterStatistics


class _Sums:
    """Sums of rows and of their outer products, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.outer_DD = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x_ND: Tensor) -> None:
        x_ND = x_ND.float()
        self.count += len(x_ND)
        self.sum_D += x_ND.sum(dim=0).double().cpu()
        self.outer_DD += (x_ND.T @ x_ND).double().cpu()

    def finish(self) -> LayerStatistics:
        sum_D: Any = np.asarray(self.sum_D)
        outer_DD: Any = np.asarray(self.outer_DD)
        return LayerStatistics(float(self.count), sum_D, outer_DD)


def gather_sums(model: SpeechModel, batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> SpeechSums:
    """Sums at every site of the model's steering, or behind every encoder layer where it has none."""
    model.to(device).eval()
    sites = model.steering.shape.sites if model.steering else model.frozen.num_layers
    frames, means = ([_Sums(model.frozen.width) for _ in range(sites)] for _ in range(2))

    def see(site: int, u_BTD: Tensor, length_B: Tensor) -> None:
        mask_BT = frame_mask(length_B, u_BTD.shape[1])
        frames[site].add(u_BTD[mask_BT])
        means[site].add(masked_mean(u_BTD.float(), mask_BT))

    model.seen_by = see
    try:
        with torch.inference_mode():
            for tensors in batches:
                model.encode(tensors["features"].to(device), tensors["frames"].to(device))
    finally:
        model.seen_by = None
    return SpeechSums(_statistics(frames), _statistics(means))


def _statistics(sites: list[_Sums]) -> RouterStatistics:
    nothing: Any = np.zeros(1)
    ones: Any = np.ones(len(sites))
    return RouterStatistics([site.finish() for site in sites], nothing, ones)
