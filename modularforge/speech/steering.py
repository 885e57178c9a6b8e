"""Steering vectors between the frozen layers of an encoder, and the gates that mix them (SteerMoE, arXiv 2510.13558).

At site l, of T frames u: gate g = softmax(W_l u + b_l) over the vectors, dense and per frame, and
x = u + s_l * sum of g_e V_le. Assembled from jobs that were trained alone, each job's vectors keep their own gate, and
a router solved from what the jobs counted says how much each job weighs; forced onto one job, it is that job's model.
"""

# B batch  T frames  D width  L sites  E vectors of all experts  K experts  v vectors of one expert

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

VECTOR_STD = 0.01
Routing = Literal["frame", "utterance"]


@dataclass(frozen=True)
class SteeringShape:
    """Sizes of a model's steering, and how its gates work.

    `vectors` are those of each of the `experts`. `routing` says whether the weights of experts are chosen for each
    frame, or for an utterance by the mean of its frames. `is_scaled`: whether what the vectors add is scaled, per site.
    `active` vectors with the largest gates are kept, null keeps all; `scale_bound` bounds scales by a tanh.
    """

    sites: int
    width: int
    vectors: int
    experts: int = 1
    is_scaled: bool = True
    routing: Routing = "frame"
    active: int | None = None
    scale_bound: float | None = None

    @property
    def total(self) -> int:
        """Vectors of all experts at one site."""
        return self.vectors * self.experts


class ExpertWeights(nn.Module):
    """How much each expert of a model weighs at a site: router rows [L, K, D] and offsets [L, K], which no job trains.

    `forced` is the one expert that alone weighs; `observed` counts what is chosen while the model runs.
    """

    def __init__(self, shape: SteeringShape) -> None:
        super().__init__()
        self.shape = shape
        if shape.experts > 1:
            sites, experts = shape.sites, shape.experts
            self.router_weight = nn.Parameter(torch.zeros(sites, experts, shape.width), requires_grad=False)
            self.router_bias = nn.Parameter(torch.zeros(sites, experts), requires_grad=False)
        self.forced: int | None = None
        self.observed: GateUsage | None = None

    def expert_weights(self, site: int, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """How much each expert weighs, [B, T, K], or [B, 1, K] where an utterance's frames weigh alike."""
        if self.forced is not None:
            chosen_K = torch.arange(self.shape.experts, device=x_BTD.device) == self.forced
            return chosen_K.float().expand(*x_BTD.shape[:1], 1, -1)
        if self.shape.routing == "utterance":
            x_BTD = masked_mean(x_BTD, mask_BT)[:, None]
        return (x_BTD @ self.router_weight[site].T + self.router_bias[site]).softmax(dim=-1)

    def scales_K(self, _site: int) -> Tensor:
        """What each expert is scaled by at a site; empty where nothing is."""
        return torch.empty(0)

    def lengths_LE(self) -> Tensor:
        """Lengths of what is added, at each site by each vector, or by each expert where there are none."""
        raise NotImplementedError

    def length_added(self, _site: int, _gate_NE: Tensor) -> Tensor | None:
        """Lengths [N] of what these gates add to frames, or None where it depends on more than gates."""
        return None

    def observe(self, site: int, gate_BTE: Tensor, mask_BT: Tensor) -> None:
        """Count the gates of the frames that are there, where somebody wants to know them."""
        if self.observed is not None:
            self.observed.add(site, gate_BTE[mask_BT].detach())


class Steering(ExpertWeights):
    """All sites' vectors V [L, E, D], gate rows W [L, E, D] and b [L, E], and scales [L, K]."""

    def __init__(self, shape: SteeringShape, start_scale: float = 0.1) -> None:
        super().__init__(shape)
        sites, width, total = shape.sites, shape.width, shape.total
        self.vectors = nn.Parameter(torch.randn(sites, total, width) * VECTOR_STD)
        self.gate_weight = nn.Parameter(torch.empty(sites, total, width).uniform_(-1, 1) / width**0.5)
        self.gate_bias = nn.Parameter(torch.zeros(sites, total))
        self.mean_gates: list[Tensor] | None = None
        """Where a list, forward appends the mean gates [E] of each site to it."""
        if shape.is_scaled:
            self.scale = nn.Parameter(torch.full((sites, shape.experts), start_scale))

    def forward(self, site: int, u_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Frames with what the vectors add; `mask` says which frames are there. Gates are computed in float32."""
        with torch.autocast(u_BTD.device.type, enabled=False):
            gate_BTE = self.gates(site, u_BTD, mask_BT)
            weight_BTE = gate_BTE * self.scales(site) if self.shape.is_scaled else gate_BTE
            added_BTD = weight_BTE @ self.vectors[site].float()
        self.observe(site, gate_BTE, mask_BT)
        if self.mean_gates is not None:
            self.mean_gates.append(gate_BTE[mask_BT].mean(dim=0))
        return u_BTD + added_BTD.to(u_BTD.dtype)

    def gates(self, site: int, u_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """How much each vector weighs at each frame [B, T, E]; all of a frame add up to one."""
        x_BTD = u_BTD.float()
        logits_BTE = x_BTD @ self.gate_weight[site].float().T + self.gate_bias[site]
        logits_BTKv = logits_BTE.view(*logits_BTE.shape[:2], self.shape.experts, self.shape.vectors)
        gate_BTKv = logits_BTKv.softmax(dim=-1)
        if self.shape.experts > 1:
            gate_BTKv = gate_BTKv * self.expert_weights(site, x_BTD, mask_BT)[..., None]
        return self._kept(gate_BTKv.flatten(-2))

    def scales(self, site: int) -> Tensor:
        """What each vector is scaled by, [E]."""
        scale_K, bound = self.scale[site].float(), self.shape.scale_bound
        scale_K = scale_K if bound is None else bound * torch.tanh(scale_K / bound)
        return scale_K.repeat_interleave(self.shape.vectors)

    def scales_K(self, site: int) -> Tensor:
        """What each expert is scaled by at a site; empty where nothing is."""
        return self.scales(site)[:: self.shape.vectors] if self.shape.is_scaled else torch.empty(0)

    def lengths_LE(self) -> Tensor:
        """Lengths of the vectors."""
        length_LE: Tensor = torch.linalg.vector_norm(self.vectors.detach().float(), dim=-1)
        return length_LE

    def length_added(self, site: int, gate_NE: Tensor) -> Tensor:
        """Lengths [N] of what these gates add to frames."""
        weight_NE = gate_NE * self.scales(site) if self.shape.is_scaled else gate_NE
        length_N: Tensor = torch.linalg.vector_norm(weight_NE @ self.vectors[site].float(), dim=-1)
        return length_N

    def _kept(self, gate_BTE: Tensor) -> Tensor:
        if self.shape.active is None or self.shape.active >= self.shape.total:
            return gate_BTE
        value_BTA, index_BTA = gate_BTE.topk(self.shape.active, dim=-1)
        kept_BTE = torch.zeros_like(gate_BTE).scatter(-1, index_BTA, value_BTA)
        return kept_BTE / kept_BTE.sum(dim=-1, keepdim=True)


def unevenness(gate_LE: Tensor) -> Tensor:
    """How unevenly vectors are used: 1 where all have the same mean gate at every site, E where one has all of it."""
    return gate_LE.shape[1] * gate_LE.square().sum(dim=1).mean()


def likeness(vectors_LED: Tensor) -> Tensor:
    """Mean squared cosine between two vectors of a site; 0 where all are orthogonal, or where there is but one."""
    unit_LED = nn.functional.normalize(vectors_LED.float(), dim=-1)
    cosine_LEE = unit_LED @ unit_LED.mT
    own_EE = torch.eye(vectors_LED.shape[1], device=cosine_LEE.device, dtype=torch.bool)
    others = max(1, vectors_LED.shape[1] * (vectors_LED.shape[1] - 1))
    return cosine_LEE.masked_fill(own_EE, 0).square().sum(dim=(1, 2)).mean() / others


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the frames that are there, [B, D]."""
    weight_BT1 = mask_BT[..., None].to(x_BTD.dtype)
    return (x_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp(min=1)


class GateUsage:
    """What a model's gates did while it ran, site by site: sums over frames, so that any number of them can be seen."""

    def __init__(self, shape: SteeringShape) -> None:
        self.shape, self.frames_L = shape, torch.zeros(shape.sites, dtype=torch.float64)
        self.sum_LE = torch.zeros(shape.sites, shape.total, dtype=torch.float64)
        self.entropy_L = torch.zeros(shape.sites, dtype=torch.float64)

    def add(self, site: int, gate_NE: Tensor) -> None:
        """Count the gates of frames at a site."""
        gate_NE = gate_NE.double().cpu()
        self.frames_L[site] += len(gate_NE)
        self.sum_LE[site] += gate_NE.sum(dim=0)
        self.entropy_L[site] -= (gate_NE * gate_NE.clamp(min=1e-30).log()).sum()

    @property
    def share_LE(self) -> Tensor:
        """Mean gate of every vector."""
        return self.sum_LE / self.frames_L.clamp(min=1)[:, None]

    @property
    def share_LK(self) -> Tensor:
        """Mean weight of every expert."""
        return self.share_LE.view(self.shape.sites, self.shape.experts, self.shape.vectors).sum(dim=-1)

    @property
    def evenness_L(self) -> Tensor:
        """Mean entropy of a frame's gates over its maximum: 1 where all weigh alike, 0 where one alone does."""
        return self.entropy_L / self.frames_L.clamp(min=1) / math.log(max(2, self.shape.total))
