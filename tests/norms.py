"""A small decoder that measures the norms of its gradients: `python -m tests.norms FOLDER`, on two ranks.

The embedding is frozen; attention is paused at first, the feed-forward blocks of the first layer never learn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.backbone import build_backbone
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import World, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from tests.shard_ranks import together

STEPS, EVERY, ATTENTION_FROM, BATCH, LAYERS = 8, 2, 4, 4, 3
MODEL = ModelConfig(width=8, layers=LAYERS, heads=2, kv_heads=2, ffn_width=12, context_length=8, tied_head=False)
VOCABULARY = 11


@dataclass(frozen=True)
class Texts:
    """Examples: ids that follow from the position."""

    def batches(self, position: Any = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        share = BATCH // ranks
        while True:
            ids_BT = batch_of(position)[rank * share : (rank + 1) * share]
            position += 1
            yield Batch({"inputs": ids_BT[:, :-1], "targets": ids_BT[:, 1:]}, position, ids_BT[:, 1:].numel())


def batch_of(position: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, 6), generator=torch.Generator().manual_seed(position))


def trainable() -> Trainable:
    torch.manual_seed(0)
    model = build_backbone(MODEL, VOCABULARY)
    learns = {n: w for n, w in model.named_parameters() if "embed" not in n and not n.startswith("model.layers.0.mlp")}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in learns)

    def before_step(step: int) -> None:
        for name, weight in learns.items():
            weight.requires_grad_("self_attn" not in name or step >= ATTENTION_FROM)

    return Trainable(model, TEXT.loss, [ParameterGroup(learns)], before_step)


def job_of(folder: Path, steps: int = STEPS, accumulation: int = 1, **training: Any) -> Job:
    phase = PhaseConfig(
        steps=steps, batch_size=BATCH, accumulation_steps=accumulation, peak_learning_rate=0.01, warmup_steps=1
    )
    settings = {"log_every": 3, "checkpoint_every": 2, "gradient_norms": EVERY, "clip_norm": 0.01, **training}
    places = str(folder / "checkpoints"), str(folder / "metrics" / "job.jsonl")
    return Job("job", phase, TrainingConfig(**settings), "f", *places)


def train(folder: Path, world: World | None = None, **options: Any) -> nn.Module:
    learns = trainable()
    fit(learns, Texts(), job_of(folder, **options), lambda: 0.0, world or World())
    return learns.model


def train_as_rank() -> None:
    with joined_world(torch.device("cpu")) as joined:
        train(Path(sys.argv[1]), joined)


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(2, train_as_rank)
