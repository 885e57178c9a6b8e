"""What a steered model's gates do while it runs: how much vectors weigh, how strong they are, frame by frame if asked.

Strength is the length of what is added to a frame over the length of the frame itself.
"""

# B batch  T frames  N frames that are there  D width  L sites  E vectors of all experts  K experts

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modularforge.speech.encoder import frame_mask
from modularforge.speech.model import SpeechModel
from modularforge.speech.steering import ExpertWeights, GateUsage

SHOWN_SITES = 3
MOST_FRAMES = 500
Facts = dict[str, Any]


class GateReader(GateUsage):
    """Gates with the strength of what they add; `last` are the gates of the last batch at each site [N, E]."""

    def __init__(self, steering: ExpertWeights) -> None:
        super().__init__(steering.shape)
        self.steering = steering
        self.strength_sum_L = torch.zeros(steering.shape.sites, dtype=torch.float64)
        self.last: dict[int, Tensor] = {}
        self._frames_ND = torch.empty(0)

    def see(self, _site: int, u_BTD: Tensor, length_B: Tensor) -> None:
        """Remember the frames that the next gates are of."""
        self._frames_ND = u_BTD[frame_mask(length_B, u_BTD.shape[1])].detach().float()

    def add(self, site: int, gate_NE: Tensor) -> None:
        """Count the gates of frames at a site, and what they add."""
        super().add(site, gate_NE)
        added_N = self.steering.length_added(site, gate_NE)
        if added_N is not None:
            self.strength_sum_L[site] += (added_N / self._frames_ND.norm(dim=-1).clamp(min=1e-6)).sum().double().cpu()
        self.last[site] = gate_NE.cpu()

    @property
    def strength_L(self) -> Tensor:
        """Mean strength at each site."""
        return self.strength_sum_L / self.frames_L.clamp(min=1)


@contextmanager
def reading(model: SpeechModel) -> Iterator[GateReader | None]:
    """A reader of all that the model's gates do within the block; None for a model that is not steered."""
    if model.steering is None:
        yield None
        return
    reader = model.steering.observed = GateReader(model.steering)
    model.seen_by = reader.see
    try:
        with torch.inference_mode():
            yield reader
    finally:
        model.steering.observed = model.seen_by = None


def weight_facts(steering: ExpertWeights) -> Facts:
    """What the weights alone say: lengths of vectors [L, E], and scales [L, K] where there are some."""
    shape = steering.shape
    scales = [row for site in range(shape.sites) if (row := steering.scales_K(site).tolist())]
    return {
        "experts": shape.experts,
        "vectors": shape.vectors,
        "norm_per_layer_and_vector": _rounded(steering.lengths_LE()),
        "scale_per_layer_and_expert": [[round(value, 5) for value in row] for row in scales],
    }


def usage_facts(usage: Mapping[str, GateReader]) -> Facts:
    """What gates did, in the mean over the domains and in each of them."""
    readers = list(usage.values())

    def mean(name: str) -> Any:
        return _rounded(torch.stack([getattr(reader, name) for reader in readers]).mean(dim=0))

    return {
        "share_per_layer_and_vector": mean("share_LE"),
        "share_per_domain_and_vector": {
            label: _rounded(reader.share_LE.mean(dim=0)) for label, reader in usage.items()
        },
        "evenness_per_layer": mean("evenness_L"),
        "strength_per_layer": mean("strength_L") if any(reader.strength_sum_L.any() for reader in readers) else [],
    }


def frame_facts(model: SpeechModel, features_FM: Tensor, about: Mapping[str, Any]) -> Facts:
    """Gates of one utterance by frame at the first, the middle and the last site [E, T]; `about` says which it is."""
    with reading(model) as reader:
        assert reader is not None
        model.encode(features_FM[None].to(model.device), torch.tensor([len(features_FM)], device=model.device))
    sites = sorted({0, reader.shape.sites // 2, reader.shape.sites - 1})
    gates = [_rounded(reader.last[site][:MOST_FRAMES].T, 3) for site in sites]
    return {"utterance": {**about, "layers": sites, "gates": gates}, **usage_facts({"": reader})}


def _rounded(values: Tensor, digits: int = 5) -> Any:
    return torch.round(values.double(), decimals=digits).tolist()
