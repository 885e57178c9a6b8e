"""A job whose parts are switched by step, as a kind of expert with phases has them: `python -m tests.phases FOLDER`.

A projector learns first, then an adapter alone, then both; the head never does. Run it with torchrun for several ranks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.config import PhaseConfig, TrainingConfig
from modularforge.experts.trainable import ParameterGroup, Tensors, Trainable
from modularforge.tasks.task import Batch
from modularforge.training.distributed import World, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit

STEPS, ADAPTER_FROM, BOTH_FROM = 18, 6, 12
BATCH, WIDTH = 4, 3


class Speech(nn.Module):
    """A frozen head behind an adapter behind a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.projector, self.adapter = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 1).requires_grad_(False)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = self.projector(x_BD)
        return self.head(x_BD + self.adapter(x_BD).tanh())


@dataclass(frozen=True)
class Sums:
    """Examples: the sum of each row is to be told."""

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        share = BATCH // ranks
        while True:
            x_BD = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(position))
            x_BD, position = x_BD[rank * share : (rank + 1) * share], position + 1
            yield Batch({"x": x_BD, "y": x_BD.sum(dim=1, keepdim=True)}, position, 0.25 * share)


def loss(model: nn.Module, tensors: Tensors) -> Tensor:
    return (model(tensors["x"]) - tensors["y"]).square().mean()


def job_of(folder: Path, training: TrainingConfig) -> Job:
    phase = PhaseConfig(steps=STEPS, batch_size=BATCH, peak_learning_rate=0.05, warmup_steps=2, weight_decay=0.1)
    return Job(
        "phases", phase, training, "f", str(folder / "checkpoints"), str(folder / "metrics.jsonl"), unit="seconds"
    )


SEEN: list[int] = []
"""The steps that this process began: a job that goes on does not begin at 0."""


def trainable(kill_before: int | None = None) -> Trainable:
    """The job's parameters in two groups; the process is killed before a step when that is asked for."""
    torch.manual_seed(0)
    model = Speech()
    parts = {"projector": model.projector, "adapter": model.adapter}

    def before_step(step: int) -> None:
        SEEN.append(step)
        if step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        model.projector.requires_grad_(step < ADAPTER_FROM or step >= BOTH_FROM)
        model.adapter.requires_grad_(step >= ADAPTER_FROM)

    named = {
        part: {f"{part}.{name}": weight for name, weight in module.named_parameters()} for part, module in parts.items()
    }
    groups = [ParameterGroup(named["projector"]), ParameterGroup(named["adapter"], rate_factor=0.5, weight_decay=0.0)]
    seen = {"adapter_norm": 0.0}

    def observations() -> dict[str, float]:
        seen["adapter_norm"] = float(model.adapter.weight.detach().norm())
        return seen

    return Trainable(model, loss, groups, before_step, observations)


def train(folder: Path, world: World, kill_before: int | None = None, every: int = 2) -> Trainable:
    learns = trainable(kill_before)
    training = TrainingConfig(log_every=1, checkpoint_every=every, keep_checkpoints=100, validate_every=STEPS)
    fit(learns, Sums(), job_of(folder, training), lambda: 0.0, world)
    return learns


if __name__ == "__main__":
    with joined_world(torch.device("cpu")) as joined:
        target = Path(sys.argv[1])
        trained = train(target, joined, int(sys.argv[2]) if len(sys.argv) > 2 else None)
        if joined.is_main:
            torch.save(trained.model.state_dict(), target / "weights.pt")
