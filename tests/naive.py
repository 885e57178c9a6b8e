"""Losses computed without the scorer, as a reference for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modularforge.data.loader import evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.model.backbone import Decoder


@dataclass
class Naive:
    """Losses and bits per byte by domain, and their means."""

    losses: dict[str, float]
    bits: dict[str, float]

    @property
    def mean_loss(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def mean_bits_per_byte(self) -> float:
        return sum(self.bits.values()) / len(self.bits)


def naive_losses(
    model: Decoder,
    streams: Mapping[str, Tokens],
    byte_lengths: Tensor,
    batch_size: int,
    max_tokens: int,
    context_length: int | None = None,
) -> Naive:
    """From whole distributions, in float64, window after window."""
    found = Naive({}, {})
    context = min(context_length or model.config.positions, model.config.positions)
    for label, tokens in streams.items():
        total, count, size = 0.0, 0, 0
        for inputs_BT, targets_BT in evaluation_batches(tokens, context, batch_size, max_tokens):
            with torch.no_grad():
                logs_BTV = model(inputs_BT).double().log_softmax(dim=-1)
            kept = targets_BT >= 0
            total -= float(logs_BTV.gather(2, targets_BT.clamp(min=0)[..., None])[..., 0][kept].sum())
            count, size = count + int(kept.sum()), size + int(byte_lengths[targets_BT[kept]].sum())
        found.losses[label], found.bits[label] = total / count, total / size / math.log(2)
    return found
