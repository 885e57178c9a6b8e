"""Train one expert alone: it reads the backbone and its own partition, and nothing of any other expert.

Where experts are trained in rounds (docs/rounds.md), it also reads what the merge of the round before made of the
weights that all share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

from torch import nn

from checkpoints import Artifact, ArtifactWriter
from checkpoints.pieces import TENSORS_NAME
from checkpoints.tensors import read_weight_file, weight_file_chunks, weight_file_size
from checkpoints.training import STATE_NAME, Checkpoint
from modularforge.assembly.shared import SHARED_NAME
from modularforge.config import Config
from modularforge.experts.job import partition_facts, save_expert, train_expert_from
from modularforge.experts.kind import ExpertJob
from modularforge.experts.sums import save_token_counts
from modularforge.log import logger
from modularforge.model import names
from modularforge.model.shards import host_tensors, in_company
from modularforge.pipeline import JobName, made_in_round
from modularforge.provenance import commit, making, save_settings
from modularforge.run import Run
from modularforge.stage_outputs import domains_of
from modularforge.tasks.task import examples_taken, task_of
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job

WEIGHTS = "weights."  # before the names of weights in a checkpoint
Save = Callable[[ExpertJob, nn.Module, Checkpoint, ArtifactWriter], dict[str, Any]]
"""Writes what a trained expert leaves, and returns facts for the manifest."""


def run(run: Run, index: int) -> Artifact:
    """Train and commit expert `index` unless it is done (called on every rank; rank 0 writes), its last round too."""

    def save(expert: ExpertJob, model: nn.Module, _: Checkpoint, writer: ArtifactWriter) -> dict[str, Any]:
        return save_expert(expert, model, writer.folder)

    return _train(run, "expert", index, run.config.experts.rounds, save)


def train_round(run: Run, index: int, number: int) -> Artifact:
    """Train expert `index` through a round, counted from 1, that is not the last, and commit how far it has come."""
    return _train(run, made_in_round(number)[0], index, number, save_round)


def save_round(expert: ExpertJob, _: nn.Module, state: Checkpoint, writer: ArtifactWriter) -> dict[str, Any]:
    """Write what is shared into one file, for the merge, and into another what only the next round of this expert
    reads: its own weights and AdamW's moments of all, in float32.
    """
    every = host_tensors(state.tensors)
    shared = {name for name in every if name.startswith(WEIGHTS) and _is_shared(name, expert.config)}
    exchanged = {name.removeprefix(WEIGHTS): every[name] for name in shared}
    own = {name: tensor for name, tensor in every.items() if name not in shared}
    for file, tensors in ((SHARED_NAME, exchanged), (TENSORS_NAME, own)):
        writer.write_chunks(file, weight_file_chunks(tensors), weight_file_size(tensors))
    writer.write_json(STATE_NAME, state.state)
    if {"embeddings", "head"} & {*expert.config.experts.unfreeze}:
        save_token_counts(expert, writer.folder)
    return {"index": expert.index, "step": state.step, **partition_facts(expert)}


def state_after(run: Run, index: int, number: int) -> Checkpoint:
    """Where an expert stands after a round: its own weights and all moments as it left them, what is shared merged."""
    stages = made_in_round(number)
    own, merged = run.require(stages[0], index), run.require(stages[1])
    if str(JobName(stages[0], index)) not in merged.manifest.inputs:
        logger.info("expert %d was late for %s, and joins the others again here", index, stages[1])
    shared = read_weight_file(merged, SHARED_NAME)
    tensors = read_weight_file(own, TENSORS_NAME) | {f"{WEIGHTS}{name}": tensor for name, tensor in shared.items()}
    return Checkpoint(run.config.round_ends(number), tensors, own.read_json(STATE_NAME))


def settled(expert: ExpertJob, start: Checkpoint) -> tuple[ExpertJob, Checkpoint]:
    """The job of a last round in which nothing shared learns: behind what was merged, in the types that are stored."""
    frozen = {name: tensor for name, tensor in start.tensors.items() if _is_shared(name, expert.config)}
    types = expert.backbone.tensors
    merged = {
        name: tensor.to(types[name].dtype)
        for name, tensor in ((name.removeprefix(WEIGHTS), tensor) for name, tensor in frozen.items())
        if name in types
    }
    backbone = copy(expert.backbone)
    backbone.__dict__["tensors"] = {**types, **merged}
    experts = expert.config.experts.model_copy(update={"unfreeze": []})
    alone = replace(expert, backbone=backbone, config=expert.config.model_copy(update={"experts": experts}))
    return alone, replace(start, tensors={name: start.tensors[name] for name in start.tensors.keys() - frozen.keys()})


def _is_shared(name: str, config: Config) -> bool:
    """Whether a tensor of a checkpoint, weight or moment, is of what all experts share."""
    return names.shared_part(name.partition(".")[2]) in config.experts.unfreeze


def _train(run: Run, stage: str, index: int, number: int, save: Save) -> Artifact:
    """Train an expert through one of its rounds, and commit what `save` writes, unless it is done."""
    config, name = run.config, JobName(stage, index)
    plan = run.plan(stage, index)
    if found := run.finished(plan):
        logger.info("%s is finished: %s", name, plan.url)
        return found
    partitions, task = run.require("partition"), task_of(config)
    examples = task.part(config, partitions, index)
    domains = domains_of(partitions, index)
    held_out = task.validation(config, run.corpus, domains)
    start = state_after(run, index, number - 1) if number > 1 else None
    job = Job.of_run(config, str(name), config.experts, plan.fingerprint, config.round_ends(number))
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        expert = ExpertJob(config, index, run.backbone, task, examples, world.device, world)
        trained, clock = expert, time.perf_counter()
        if start and config.experts.settle and number == config.experts.rounds:
            trained, start = settled(expert, start)
        model, losses, state = train_expert_from(start, trained, held_out, job, world)
        seconds = round(time.perf_counter() - clock, 3)
        with in_company(model, world.total, state.tensors):
            if world.is_main:
                with making(plan) as writer:
                    facts = save(expert, model, state, writer)
                    taken = examples_taken(examples, int(losses.get("steps") or config.experts.steps))
                    facts |= {**taken, "training_seconds": seconds, "domains": domains}
                    commit(writer, plan, run, {**losses, **facts})
        world.barrier()
    return run.made(stage, index)
