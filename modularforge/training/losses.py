"""What the loop minimises and what it validates on."""

# B batch  T tokens

from __future__ import annotations

from itertools import islice

from torch import Tensor, nn

from modularforge.data.loader import evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.evaluation.scoring import summed_loss
from modularforge.experts.trainable import Loss, Tensors
from modularforge.model.backbone import Decoder
from modularforge.model.moe import load_balance_loss, observe_routing, router_z_loss
from modularforge.training.distributed import World


class RoutedLoss:
    """The loss of a task and those of the routers: z-loss and, where it is given a weight, load balance.

    An anchored pair needs no balance, since both are always visited.
    """

    def __init__(self, model: Decoder, loss: Loss, z_loss: float, balance_loss: float | None = None) -> None:
        self.model, self.loss, self.z_loss, self.balance_loss = model, loss, z_loss, balance_loss
        observe_routing(model)

    def __call__(self, model: nn.Module, tensors: Tensors) -> Tensor:
        """Loss of one batch; `model` may be the wrapped decoder."""
        loss = self.loss(model, tensors) + self.z_loss * router_z_loss(self.model)
        return loss if self.balance_loss is None else loss + self.balance_loss * load_balance_loss(self.model)


def mean_loss(model: Decoder, tokens: Tokens, context_length: int, batch_size: int, world: World) -> float:
    """Mean loss per token of a stream in float32, its batches shared out among the ranks (called on every rank)."""
    mine = islice(evaluation_batches(tokens, context_length, batch_size), world.rank, None, world.size)
    total, tokens_seen = world.total([*summed_loss(model, mine, world.device)])
    return total / tokens_seen
