"""What the loop minimises and what it validates on."""

from __future__ import annotations

from torch import Tensor, nn

from modularforge.experts.trainable import Loss, Tensors, Trainable, trainable
from modularforge.model.backbone import Decoder
from modularforge.model.moe import load_balance_loss, observe_routing, router_z_loss
from modularforge.model.shards import in_company
from modularforge.tasks.task import Validation
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


def routed(model: Decoder, loss: Loss, z_loss: float, balance_loss: float | None = None) -> Trainable:
    """A mixture with its routers, of whose experts a batch may visit none of some: they get no gradient then."""
    return trainable(model, RoutedLoss(model, loss, z_loss, balance_loss), may_skip_parameters=True)


def mean_loss(model: nn.Module, held_out: Validation, world: World) -> float:
    """Mean loss per target of held-out examples, which are shared out among the ranks (called on every rank)."""
    with in_company(model, world.total):
        found = held_out.summed_loss(model, world.rank, world.size)
    loss, targets = world.total([*found])
    return loss / targets
