"""Rotary positions: the frequencies of a model, stretched as its config says, and the angles of a range of positions.

The rules for stretched contexts are those of transformers (modeling_rope_utils), so that pretrained models keep theirs.
"""

# T tokens  H head width

from __future__ import annotations

import math

import torch
from torch import Tensor

from modularforge.config import ModelConfig, RopeScalingConfig


def rotary_frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Angle per position [H/2] in float32 (arXiv 2104.09864), and the factor of cosines and sines (1 but for YaRN)."""
    width, scaling = model.width_per_head, model.rope_scaling
    # Written as transformers does: at position 100,000 the last bit of a frequency is a hundredth of a turn.
    plain = 1.0 / model.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None:
        return plain, 1.0
    original = scaling.original_max_position_embeddings or model.positions
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling, original), 1.0
    return _yarn(plain, scaling, original, model.rope_theta), _yarn_attention_factor(scaling)


def rotary_angles(frequencies: Tensor, positions: range, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, H] of consecutive positions, in Llama's half-split layout, times `scale`."""
    steps_T = torch.arange(positions.start, positions.stop, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(steps_T, frequencies)
    angles_TH = torch.cat([angles, angles], dim=-1)
    return angles_TH.cos() * scale, angles_TH.sin() * scale


def _llama3(plain: Tensor, scaling: RopeScalingConfig, original: int) -> Tensor:
    """Long waves stretched, short ones kept, those in between blended (Llama 3.1)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None
    assert high is not None
    waves = 2 * math.pi / plain
    kept = (original / waves - low) / (high - low)
    blended = (1 - kept) * plain / scaling.factor + kept * plain
    return torch.where(
        waves > original / low, plain / scaling.factor, torch.where(waves < original / high, plain, blended)
    )


def _yarn(plain: Tensor, scaling: RopeScalingConfig, original: int, theta: float) -> Tensor:
    """Fast frequencies kept, slow ones stretched, with a linear ramp between (YaRN, arXiv 2309.00071, section 3.2)."""
    width = 2 * len(plain)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001  # as transformers does, against a division by zero
    stretched = ((torch.arange(len(plain), dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def _yarn_attention_factor(scaling: RopeScalingConfig) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
