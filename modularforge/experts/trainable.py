"""What a job trains, as the training loop sees it: a model, its parameters in groups, a loss and two hooks.

Groups name all parameters of the job, also those that are frozen at the moment: checkpoints are keyed by them, so that
a job whose parts are switched by step resumes in any of its phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
"""A batch, or a part of one, by name; each [B, …]."""

Loss = Callable[[nn.Module, Tensors], Tensor]
"""The mean loss of a batch under a model, which may be wrapped for several ranks."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a rate and a decay.

    Their rate is the schedule's times `rate_factor`. `weight_decay` outranks the phase's; by either, matrices decay,
    norm gains and embeddings do not. Their gradients are scaled down to `clip_norm`, where it is given, before those of
    all groups together are to the job's.
    """

    parameters: Mapping[str, nn.Parameter]
    rate_factor: float = 1.0
    weight_decay: float | None = None
    clip_norm: float | None = None


def _nothing(_step: int) -> None:
    """All steps are alike."""


@dataclass(frozen=True)
class Trainable:
    """A model and how it is trained.

    `before_step` gets the number of steps done; what it does must follow from that number alone, or a resumed job would
    go another way. It may switch `requires_grad` of the groups' parameters. `observations` are further numbers for the
    metrics, the same names on every rank. `may_skip_parameters` says that a batch may leave some without a gradient.
    `masks` say by name which entries of a parameter learn, where not all do. `weights` make those of a model on the
    meta device, in their order, once it is known which of them this process holds; then none are left here.
    """

    model: nn.Module
    loss: Loss
    groups: Sequence[ParameterGroup]
    before_step: Callable[[int], None] = _nothing
    observations: Callable[[], Mapping[str, float]] = dict
    may_skip_parameters: bool = False
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the job by name, in the groups' order."""
        return {name: weight for group in self.groups for name, weight in group.parameters.items()}


def trainable(
    model: nn.Module,
    loss: Loss,
    may_skip_parameters: bool = False,
    weights: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Trainable:
    """The model with all of its parameters that require gradients now, tied ones once, as one group."""
    learns = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [ParameterGroup(learns)]
    return Trainable(model, loss, groups, may_skip_parameters=may_skip_parameters, weights=weights or {})
