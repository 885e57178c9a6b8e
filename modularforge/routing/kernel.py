"""Constant queries and keys that make one attention head a mean over recent tokens, by rotary positions alone.

On one rotary pair with angle a per position, a constant query and key give the token D back the score A cos(a D): a
bell that falls to half its weight within some 20 tokens and comes back after a turn. Slower pairs hold it down there.
"""

# H head width

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from modularforge.config import ModelConfig, RopeScalingConfig

Values = NDArray[np.float32]

# A a squared, the bell's curvature: weights are near exp(-0.001 D squared), half at D = 26. Narrower means are noisier,
# wider ones stay longer in a domain that the text has left (filters in docs/log.md).
CURVATURE = 0.002
USUAL_ANGLE = 0.01  # a turn of 628 tokens
ANGLES = (0.003, 0.05)  # outside, the bell would need scores that bf16 cannot hold, or return at once
SLOWER = 4.0  # each further pair's angle is smaller by so much, and holds the bell down from one turn to the next
STRENGTH = 10.0  # of those: exp(-20) behind half a turn
RECENT = 100  # tokens: four times the distance at which the weight is half
MOST_POSITIONS = 65_536  # that heads are compared on; longer contexts are judged by their beginning
SHARES = (1.0, 0.8, 0.6, 0.45, 0.3)  # of the sizes, that are tried where a norm bounds them


@dataclass(frozen=True)
class HeadNorms:
    """Gains [H] of the norms over queries and keys, None where the model has none."""

    query_H: Values | None
    key_H: Values | None


def kernel_head(model: ModelConfig, norms: HeadNorms) -> tuple[Values, Values]:
    """Query and key [H] before their norms and rotation; zeros, a uniform mean, where no rotary pair suits."""
    width = model.width_per_head
    strengths = bell(angles_of(model), model.positions)
    # Scores are divided by the root of the head's width; query and key have the same share of it.
    sizes = {pair: math.sqrt(strength * math.sqrt(width)) for pair, strength in strengths.items()}
    if norms.query_H is None or norms.key_H is None:
        query_H = np.zeros(width, np.float32)
        query_H[list(sizes)] = list(sizes.values())
        return query_H, query_H.copy()
    free = [pair for pair in reversed(range(width // 2)) if pair not in sizes]
    if not sizes or len(free) < 2:
        return np.zeros(width, np.float32), np.zeros(width, np.float32)
    # A norm bounds their length: then the bell is as narrow as what fits can make it.
    heads = [_Heads(model, _smaller(sizes, *shares), norms, (free[0], free[1])) for shares in product(SHARES, SHARES)]
    best = max(heads, key=lambda item: item.recent_share)
    return best.query_H, best.key_H


def _smaller(sizes: dict[int, float], share: float, slower_share: float) -> dict[int, float]:
    """The sizes with the first pair's, and those of the slower pairs, at a share of what they should be."""
    return {pair: size * (slower_share if place else share) for place, (pair, size) in enumerate(sizes.items())}


@dataclass(frozen=True)
class _Heads:
    """Query and key of these sizes, under norms; what is left of their lengths lies where the other has nothing."""

    model: ModelConfig
    sizes: dict[int, float]
    norms: HeadNorms
    ballast: tuple[int, int]

    @cached_property
    def query_H(self) -> Values:
        """The query before its norm."""
        return _under_norm(self.sizes, self.norms.query_H, self.ballast[0])

    @cached_property
    def key_H(self) -> Values:
        """The key before its norm."""
        return _under_norm(self.sizes, self.norms.key_H, self.ballast[1])

    @property
    def recent_share(self) -> float:
        """Of a full context's weight, the part that lies within RECENT tokens."""
        query_H, key_H = (
            head_H / np.sqrt(np.square(head_H).mean()) * gains_H
            for head_H, gains_H in ((self.query_H, self.norms.query_H), (self.key_H, self.norms.key_H))
        )
        angles, back = angles_of(self.model), np.arange(min(self.model.positions, MOST_POSITIONS))
        score = np.zeros(len(back))
        for pair in self.sizes:
            score += query_H[pair] * key_H[pair] / math.sqrt(len(query_H)) * (np.cos(float(angles[pair]) * back) - 1.0)
        weight = np.exp(score)
        return float(weight[:RECENT].sum() / weight.sum())


def bell(angles: Values, positions: int) -> dict[int, float]:
    """Strength A of each rotary pair that is used; empty where none suits."""
    usable = [pair for pair, angle in enumerate(angles) if ANGLES[0] <= angle <= ANGLES[1]]
    if not usable:
        return {}
    first = min(usable, key=lambda pair: abs(math.log(angles[pair] / USUAL_ANGLE)))
    found, last = {first: CURVATURE / float(angles[first]) ** 2}, float(angles[first])
    while last * positions > math.pi:
        slower = [pair for pair, angle in enumerate(angles) if angle <= last / SLOWER]
        if not slower:
            break
        pair = max(slower, key=lambda pair: float(angles[pair]))
        found[pair], last = STRENGTH, float(angles[pair])
    return found


def angles_of(model: ModelConfig) -> Values:
    """Angle per position of each rotary pair [H/2], as model/backbone.py computes it, without torch."""
    width, scaling = model.width_per_head, model.rope_scaling
    plain = 1.0 / model.rope_theta ** (np.arange(0, width, 2) / width)
    if scaling is None:
        return plain.astype(np.float32)
    original = scaling.original_max_position_embeddings or model.positions
    return (plain / _stretch(plain, scaling, original)).astype(np.float32)


def _stretch(plain: NDArray[np.float64], scaling: RopeScalingConfig, original: int) -> NDArray[np.float64]:
    """By how much each pair's wave is longer than in the unscaled model."""
    factor = np.full_like(plain, scaling.factor)
    if scaling.rope_type == "linear":
        return factor
    turns = original * plain / (2 * math.pi)
    if scaling.rope_type == "llama3":
        low, high = float(scaling.low_freq_factor or 1), float(scaling.high_freq_factor or 4)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    else:  # YaRN blends by the pair's place, which is linear in the logarithm of its turns
        slow, fast = math.log(scaling.beta_slow or 1), math.log(scaling.beta_fast or 32)
        kept = np.clip((np.log(turns) - slow) / (fast - slow), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / factor)


def _under_norm(sizes: dict[int, float], gains_H: Values | None, ballast: int) -> Values:
    """A vector of mean square one that has these sizes behind the gains, or less where the gains are too small.

    What is left of its length lies on `ballast`.
    """
    assert gains_H is not None
    head_H = np.zeros(len(gains_H), np.float32)
    for pair, size in sizes.items():
        gain = float(gains_H[pair])
        head_H[pair] = size / gain if abs(gain) > 1e-3 else 0.0
    length = float(np.square(head_H).sum())
    if length > len(head_H):
        head_H *= math.sqrt(len(head_H) / length)
        return head_H
    head_H[ballast] = math.sqrt(len(head_H) - length)
    return head_H
