"""What the loop minimises and what it validates on."""

# B batch  T tokens

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from modularforge.data.loader import evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.evaluation.scoring import summed_loss
from modularforge.model.backbone import Decoder, cross_entropy
from modularforge.model.moe import moe_layers, observe_routing, router_z_loss
from modularforge.training.distributed import World


def language_loss(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return cross_entropy(model(inputs_BT), targets_BT)


class AnchoredLoss:
    """Cross-entropy and router z-loss of an anchored pair; there is no balance loss, since both are always visited."""

    def __init__(self, model: Decoder, z_loss: float) -> None:
        self.model, self.z_loss = model, z_loss
        observe_routing(model)

    def __call__(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Loss of one batch; `model` may be the wrapped decoder."""
        loss = cross_entropy(model(inputs_BT), targets_BT)
        return loss + self.z_loss * router_z_loss(self.model)


class JointLoss:
    """Cross-entropy, router z-loss and load-balance loss of a mixture that is trained as one model."""

    def __init__(self, model: Decoder, z_loss: float, balance_loss: float) -> None:
        self.model, self.z_loss, self.balance_loss = model, z_loss, balance_loss
        observe_routing(model)

    def __call__(self, model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Loss of one batch; `model` may be the wrapped decoder."""
        loss = cross_entropy(model(inputs_BT), targets_BT)
        return loss + self.z_loss * router_z_loss(self.model) + self.balance_loss * load_balance_loss(self.model)


def load_balance_loss(decoder: Decoder) -> Tensor:
    """Mean over layers of E times the sum of share of visits and mean probability (arXiv 2101.03961, section 2.2).

    It is 1 when all experts are visited alike.
    """
    terms = []
    for layer in moe_layers(decoder):
        assert layer.observed_logits is not None
        probability_E = layer.observed_logits.softmax(dim=-1).mean(dim=0)
        _, visited_NA = layer.choose(layer.observed_logits)
        share_E = torch.bincount(visited_NA.flatten(), minlength=len(probability_E)) / visited_NA.numel()
        terms.append(len(probability_E) * (share_E * probability_E).sum())
    return torch.stack(terms).mean()


def mean_loss(model: Decoder, tokens: Tokens, context_length: int, batch_size: int, world: World) -> float:
    """Mean loss per token of a stream in float32, its batches shared out among the ranks (called on every rank)."""
    mine = islice(evaluation_batches(tokens, context_length, batch_size), world.rank, None, world.size)
    total, tokens_seen = world.total([*summed_loss(model, mine, world.device)])
    return total / tokens_seen
