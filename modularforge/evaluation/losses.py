"""Loss per domain, every token predicted once and all domains weighed alike, and where the tokens were routed."""

# B batch  T tokens  V vocabulary  N tokens that count  E experts  A active experts

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modularforge.data.loader import evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.model.backbone import Decoder, perplexity
from modularforge.model.moe import moe_layers, observe_routing


@dataclass(frozen=True)
class DomainLoss:
    """Mean loss in nats per token, and the tokens and bytes it was taken over."""

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text: comparable between tokenizers."""
        return self.loss * self.tokens / max(1, self.bytes) / math.log(2)


@dataclass
class RoutingCount:
    """Visits and weights of every expert, per layer, over the tokens of one domain."""

    visits_LE: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    weights_LE: np.ndarray[tuple[int, int], np.dtype[np.float64]]

    def __add__(self, other: RoutingCount) -> RoutingCount:
        return RoutingCount(self.visits_LE + other.visits_LE, self.weights_LE + other.weights_LE)


@dataclass
class Measurement:
    """What one model did on the domains."""

    domains: dict[str, DomainLoss] = field(default_factory=dict)
    routing: dict[str, RoutingCount] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Equal-weight mean of the domains' losses."""
        return sum(item.loss for item in self.domains.values()) / len(self.domains)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity(self.mean_loss)

    @property
    def mean_bits_per_byte(self) -> float:
        """Equal-weight mean of the domains' bits per byte."""
        return sum(item.bits_per_byte for item in self.domains.values()) / len(self.domains)


def measure(
    model: Decoder,
    domains: Mapping[str, Tokens],
    byte_lengths: Tensor,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    context_length: int | None = None,
) -> Measurement:
    """Losses (float32) on each domain's token stream, and routing counts where the model has routers.

    `byte_lengths` [V] is the number of bytes each token stands for; windows have `context_length` tokens, or as many as
    the model is made for where that is less.
    """
    model.to(device).eval()
    byte_lengths = byte_lengths.to(device)
    found = Measurement()
    observe_routing(model)
    window = min(context_length or model.config.positions, model.config.positions)
    with torch.inference_mode():
        for label, tokens in domains.items():
            batches = evaluation_batches(tokens, window, batch_size, max_tokens)
            found.domains[label], routing = _measure_domain(model, batches, byte_lengths, device)
            if routing is not None:
                found.routing[label] = routing
    observe_routing(model, False)
    return found


def _measure_domain(
    model: Decoder, batches: Iterable[tuple[Tensor, Tensor]], byte_lengths: Tensor, device: torch.device
) -> tuple[DomainLoss, RoutingCount | None]:
    loss, tokens, size = 0.0, 0, 0
    counts: list[RoutingCount] = []
    for inputs_BT, targets_BT in batches:
        targets = targets_BT.to(device).flatten()
        logits = model(inputs_BT.to(device)).flatten(0, 1).float()
        loss += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        kept = targets >= 0
        tokens += int(kept.sum())
        size += int(byte_lengths[targets[kept]].sum())
        if moe_layers(model):
            counts.append(count_routing(model, kept))
    total = RoutingCount(sum(c.visits_LE for c in counts), sum(c.weights_LE for c in counts)) if counts else None  # type: ignore[arg-type]
    return DomainLoss(loss / tokens, tokens, size), total


def count_routing(model: Decoder, kept_N: Tensor) -> RoutingCount:
    """Visits and summed weights [layers, E] of the tokens that count, from the logits of the last forward pass."""
    visits, weights = [], []
    for layer in moe_layers(model):
        assert layer.observed_logits is not None
        weight_NA, expert_NA = layer.choose(layer.observed_logits[kept_N])
        flat, experts = expert_NA.flatten(), len(layer.experts)
        visits.append(torch.bincount(flat, minlength=experts).double().cpu().numpy())
        weights.append(torch.bincount(flat, weight_NA.flatten().double(), minlength=experts).cpu().numpy())
    return RoutingCount(np.stack(visits), np.stack(weights))


def routing_summary(routing: Mapping[str, RoutingCount]) -> dict[str, object]:
    """Share of visits per layer and expert over all domains weighted alike, its balance, and domain by expert.

    Balance is the entropy of the shares over its maximum: 1 when all experts are visited alike, 0 when one is.
    """
    shares = {label: count.visits_LE / count.visits_LE.sum(axis=1, keepdims=True) for label, count in routing.items()}
    weights = {
        label: count.weights_LE / count.weights_LE.sum(axis=1, keepdims=True) for label, count in routing.items()
    }
    share_LE = np.mean(list(shares.values()), axis=0)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(axis=1)
    return {
        "share_per_layer_and_expert": share_LE.round(6).tolist(),
        "balance_per_layer": (entropy_L / math.log(max(2, share_LE.shape[1]))).round(6).tolist(),
        "share_per_domain_and_expert": {label: item.mean(axis=0).round(6).tolist() for label, item in shares.items()},
        "weight_per_domain_and_expert": {label: item.mean(axis=0).round(6).tolist() for label, item in weights.items()},
    }
