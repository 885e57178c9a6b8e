"""AdamW and its schedule, and the state of a training as plain named tensors for checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modularforge.config import PhaseConfig, TrainingConfig
from modularforge.errors import MismatchError
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.shards import is_sharded, like_piece, own_piece

LARGEST = 1e300  # a loss that any validation is better than, as a number of JSON
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
RANDOM_STATE = "random_state"
# What lies around an optimizer's methods: both import the compiler; the last is put there when one is first made.
OPTIMIZER = "torch.optim.optimizer"
AROUND = {("torch._compile", "inner"), (OPTIMIZER, "_use_grad"), (OPTIMIZER, "wrapper")}


def bare(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method without what torch (2.6 to 2.13) wraps around an optimizer's; as it is where anything else does."""
    found: Any = method
    while hasattr(found, "__wrapped__"):
        place = (found.__globals__["__name__"], found.__code__.co_name) if inspect.isfunction(found) else None
        if place not in AROUND:
            return method
        found = found.__wrapped__
    plain: Callable[..., Any] = found
    return plain


class AdamW(torch.optim.AdamW):
    """torch's, whose methods keep themselves out of graphs: to do so they import torch._dynamo, which takes a second.

    Every job would pay that at its start; a step is in no graph here, since only models are compiled. Methods that a
    torch of another version has made in another way stay as they are, and cost that second.
    """

    add_param_group = bare(torch.optim.Optimizer.add_param_group)
    zero_grad = bare(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(bare(torch.optim.AdamW.step))


def build_optimizer(groups: Sequence[ParameterGroup], phase: PhaseConfig, training: TrainingConfig) -> AdamW:
    """AdamW over all parameters of a job; matrices decay, norm gains and embeddings do not.

    Those that are frozen at a step get no gradient, and AdamW leaves them and their moments alone.
    """
    made: list[dict[str, Any]] = []
    for group in groups:
        decay = phase.weight_decay if group.weight_decay is None else group.weight_decay
        decayed = [weight for name, weight in group.parameters.items() if _decays(name, weight)]
        plain = [weight for name, weight in group.parameters.items() if not _decays(name, weight)]
        made += [
            {"params": weights, "weight_decay": share, "rate_factor": group.rate_factor}
            for weights, share in ((decayed, decay), (plain, 0.0))
            if weights
        ]
    return AdamW(made, lr=phase.peak_learning_rate, betas=(training.beta1, training.beta2), fused=True)


def _decays(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and "embed_tokens" not in name


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every group learn at its own share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate of a step (0-based): linear warm-up, then a cosine from the peak to its final share."""
    if step < phase.warmup_steps:
        return phase.peak_learning_rate * (step + 1) / phase.warmup_steps
    length = max(1, phase.steps - phase.warmup_steps)
    share = min(1.0, (step - phase.warmup_steps) / length)
    floor = phase.final_learning_rate_ratio
    return phase.peak_learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class Best:
    """The weights of the best validation so far by name, its loss and step, and how many came since that were worse."""

    weights: dict[str, Tensor]
    loss: float = math.inf
    step: int = 0
    worse: int = 0

    def see(self, loss: float, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Take the weights of a step if its validation loss is the best one."""
        if loss < self.loss:
            self.loss, self.step, self.worse = loss, step, 0
            self._copy(self.weights, parameters)
        else:
            self.worse += 1

    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """Let a job's parameters be those of its best validation."""
        self._copy(parameters, self.weights)

    @property
    def state(self) -> dict[str, float]:
        """All but the weights, for a checkpoint."""
        return {"loss": self.loss if math.isfinite(self.loss) else LARGEST, "step": self.step, "worse": self.worse}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint kept."""
        self.loss, self.step, self.worse = float(state["loss"]), int(state["step"]), int(state["worse"])
        self._copy(self.weights, {name: tensors[f"best.{name}"] for name in self.weights})

    @staticmethod
    def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, target in targets.items():
                own_piece(target).copy_(own_piece(sources[name]))


@dataclass
class Trainer:
    """What the loop carries from step to step: what learns, steps done, position in the data, and the newest losses."""

    trainable: Trainable
    optimizer: torch.optim.Optimizer
    step: int = 0
    position: Any = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    best: Best | None = None

    def keep_best(self) -> None:
        """Keep the weights of the best validation from now on."""
        parameters = self.trainable.parameters
        self.best = Best({name: own_piece(weight.detach()).clone() for name, weight in parameters.items()})

    def is_over(self, steps: int, patience: int | None) -> bool:
        """Whether all steps are done, or so many validations in a row were no better."""
        return self.step >= steps or bool(patience and self.best and self.best.worse >= patience)

    def tensors(self, take: Callable[[Tensor], Tensor] = own_piece) -> dict[str, Tensor]:
        """All of the job's weights, AdamW's moments and torch's random state, each under a name of its own.

        A weight that has never learned has no moments. `take` says what is here of that which lies in pieces.
        """
        parameters = self.trainable.parameters
        tensors = {f"weights.{name}": take(weight.detach()) for name, weight in parameters.items()}
        for name, weight in parameters.items():
            for moment, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{moment}.{name}"] = take(value)
        if self.best:
            tensors |= {f"best.{name}": weight for name, weight in self.best.weights.items()}
        tensors[RANDOM_STATE] = torch.get_rng_state()
        return tensors

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each tensor that lies in pieces on several ranks, over all of them."""
        found = {name: weight.shape[0] for name, weight in self.trainable.parameters.items() if is_sharded(weight)}
        parts = "weights", *MOMENTS[:2], *(["best"] if self.best else [])
        return {f"{part}.{name}": rows for name, rows in found.items() for part in parts}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned; raises MismatchError unless names are those of this job's parameters."""
        parameters = self.trainable.parameters
        saved = {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")}
        if wrong := sorted(saved ^ set(parameters)):
            raise MismatchError(
                f"a checkpoint must hold the parameters of its job, but {wrong[0]} ({len(wrong)} differ) is "
                f"{'not one of them' if wrong[0] in saved else 'missing'}; delete the job's checkpoints to start again"
            )
        with torch.no_grad():
            for name, weight in parameters.items():
                own_piece(weight).copy_(tensors[f"weights.{name}"])
                moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
                if moments:
                    self.optimizer.state[weight] = {k: _moment(v, weight) for k, v in moments.items()}
        # A copy: tensors read from a file may lie at addresses that torch's vector code cannot take.
        torch.set_rng_state(tensors[RANDOM_STATE].clone())


def _moment(value: Tensor, weight: Tensor) -> Tensor:
    """What AdamW keeps of a weight, from a tensor on the host; in pieces as the weight is."""
    own = value.to(weight.device, copy=True)
    return like_piece(own, weight) if own.dim() and is_sharded(weight) else own
