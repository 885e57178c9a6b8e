"""The job of an expert of any kind: the backbone and one partition in, the kind's files with facts about them out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.safetensors import WEIGHTS_NAME
from checkpoints.training import Checkpoint
from modularforge.experts.kind import KIND_FACT, ExpertJob, frozen_hashes, kind_of
from modularforge.stage_outputs import derived_seed
from modularforge.tasks.task import Validation, examples_facts
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit_from
from modularforge.training.losses import mean_loss
from modularforge.training.precision import measuring


def train_expert(
    expert: ExpertJob, held_out: Validation, job: Job, world: World
) -> tuple[nn.Module, dict[str, float | None]]:
    """A trained expert in its own model, and its final losses (called on every rank).

    Everything random follows from the seed and the index, so the order and company of experts do not matter.
    """
    return train_expert_from(None, expert, held_out, job, world)[:2]


def train_expert_from(
    start: Checkpoint | None, expert: ExpertJob, held_out: Validation, job: Job, world: World
) -> tuple[nn.Module, dict[str, float | None], Checkpoint]:
    """The same from the state after an earlier round; returns the state after this one too."""
    config = expert.config
    # A partition that fills no batch is refused before anything is computed.
    next(expert.examples.batches(0, world.rank, world.size))
    torch.manual_seed(derived_seed(config.seed, "expert weights", expert.index))
    trained = kind_of(config).prepare(expert)
    validate = partial(mean_loss, trained.model, held_out, world)
    losses, state = fit_from(trained, expert.examples, job, validate, world, start)
    return trained.model, losses, state


def partition_facts(expert: ExpertJob) -> dict[str, Any]:
    """How much an expert may weigh in a mean of what experts share; nothing of one that trains none of it."""
    tokens = getattr(expert.examples, "tokens", None)
    return {"partition_tokens": len(tokens)} if expert.config.experts.unfreeze and tokens is not None else {}


def save_expert(expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write a trained expert's files; returns facts for the manifest."""
    config, kind = expert.config, kind_of(expert.config)
    with measuring(config.training, expert.device):
        facts = kind.save(expert, model, folder)
    tokens = config.experts.steps * config.experts.batch_size * config.model.context_length
    tokens = facts.pop("training_tokens", tokens)  # of a kind whose examples are no windows
    return {
        "index": expert.index,
        KIND_FACT: kind.name,
        **facts,
        **examples_facts(expert.examples),
        "training_tokens": tokens,
        **partition_facts(expert),
        "shared_tensors": frozen_hashes(kind, expert.backbone.artifact, WEIGHTS_NAME),
    }
