"""Two ranks that train together, in two pieces a step: a mixture of whose experts most tokens visit few, or a backbone.

`python -m tests.joint_ranks FOLDER mixture compiled phases`: one after another; the last is the job of `tests.phases`.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import Trainable, trainable
from modularforge.model.backbone import build_backbone
from modularforge.model.moe import build_moe, moe_layers, restrict_routing
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import World, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import routed
from tests import phases
from tests.shard_ranks import together

T, V, EXPERTS, NEVER_VISITED, STEPS, PIECES = 8, 31, 6, 5, 6, 2
SHAPE = ModelConfig(width=16, layers=2, heads=2, kv_heads=2, ffn_width=24, context_length=T)
PHASE = PhaseConfig(
    steps=STEPS, batch_size=4, accumulation_steps=PIECES, warmup_steps=1, peak_learning_rate=1e-2, weight_decay=0.1
)
EXCHANGES = {"count": 0}


@dataclass(frozen=True)
class OneTokenRows:
    """Four rows a batch, each of one token alone: each piece of each rank visits other experts, and few of them."""

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        for place in itertools.count(int(position)):
            rows_BT = torch.tensor([[(4 * place + row) % V] for row in range(4)]).expand(4, T)
            mine_BT = rows_BT.view(PIECES, ranks, -1, T)[:, rank].reshape(-1, T)
            yield Batch({"inputs": mine_BT, "targets": (mine_BT + 1) % V}, place + 1, mine_BT.numel())


def job(name: str) -> Trainable:
    """A mixture whose rows send each token to a pair of its own, never to the last expert; or a backbone."""
    torch.manual_seed(0)
    if name == "compiled":
        return trainable(build_backbone(SHAPE, V), TEXT.loss)
    model = build_moe(SHAPE, V, EXPERTS, 2)
    for layer in moe_layers(model):
        nn.init.normal_(layer.gate.weight)  # type: ignore[arg-type]
    restrict_routing(model, range(NEVER_VISITED))
    return routed(model, TEXT.loss, 1e-3)


def train(name: str, world: World) -> dict[str, Any]:
    """Weights after training."""
    learns = job(name)
    settings = TrainingConfig(compile=name == "compiled", log_every=1)
    fit(learns, OneTokenRows(), Job(name, PHASE, settings), lambda: 0.0, world)
    return learns.model.state_dict()


class Counted(nn.parallel.DistributedDataParallel):
    """DDP that counts how often ranks exchange gradients; the model is one bucket."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # A lambda: torch compares annotations, which are text here, with its classes.
        self.register_comm_hook(None, lambda _state, bucket: _exchange(bucket))


def _exchange(bucket: Any) -> Any:
    EXCHANGES["count"] += 1
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def train_in_two(folder: Path, name: str) -> None:
    """Train on two ranks; weights and exchanges are saved behind."""
    folder.mkdir(parents=True)

    def work() -> None:
        with joined_world(torch.device("cpu")) as joined:
            model = phases.train(folder, joined).model.state_dict() if name == "phases" else train(name, joined)
            if joined.is_main:
                torch.save({"weights": model, **EXCHANGES}, folder / "found.pt")

    together(2, work)


if __name__ == "__main__":
    torch.set_num_threads(1)
    nn.parallel.DistributedDataParallel = Counted  # type: ignore[misc]
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for wanted in sys.argv[2:]:
        train_in_two(Path(sys.argv[1]) / wanted, wanted)
