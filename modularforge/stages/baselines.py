"""What the assembled model is compared with, trained on the very tokens that the experts get.

`dense` is the backbone trained on; `dense_wide` the same with as many active feed-forward weights as the assembled
model has: its FFN is widened, without a change of what it computes, to the width that a token visits there. The joint
mixtures have the assembled model's shape and are trained as one model: `joint` with a router, `joint_evidence` with the
assembled model's own, so that the two differ in nothing but whether the experts were trained together. BTX (arXiv
2403.07816) trains whole models apart, its branches, merges them, and trains the result on all partitions mixed; its
rows start from the solved ones of the merge, not from random ones, which can only help it. Beside LoRA experts stand
`joint_lora`, one such adapter, and `joint_lora_wide`, one of the rank of all experts together.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import Artifact, ArtifactWriter
from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.assembly.card import special_tokens
from modularforge.config import Config, TrainedOnAll
from modularforge.evaluation.baselines import merged_branches, solved_router
from modularforge.experts.lora.phases import phases_of, stretched
from modularforge.experts.lora.training import adapters, write_beside
from modularforge.experts.trainable import Trainable, trainable
from modularforge.log import logger
from modularforge.model import names
from modularforge.model.adapter_config import shape_of
from modularforge.model.backbone import Decoder
from modularforge.model.deferred import Deferred
from modularforge.model.folder import learned_rows, save_tensors, with_text_router
from modularforge.model.hub_config import OWN_ROWS_NAME, TABLES_NAME
from modularforge.model.shards import in_company
from modularforge.model.upcycling import joint_mixture, widened, with_own_rows, without_rows
from modularforge.pipeline import STAGES, JobName
from modularforge.provenance import commit, making, save_settings
from modularforge.routing.statistics import STATISTICS_NAME, save_statistics
from modularforge.routing.text_counts import counts_of
from modularforge.routing.text_evidence import counted_texts, write_tables
from modularforge.run import Run
from modularforge.stage_outputs import derived_seed
from modularforge.stored_tokens import partition_tokens
from modularforge.tasks.task import Examples, task_of
from modularforge.training.backbone_job import save_mixture, save_trained_on
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss, routed
from modularforge.training.precision import measuring


@dataclass(frozen=True)
class Start:
    """What a baseline trains, how the trained model is written into a folder, and examples if they are its own."""

    trainable: Trainable
    save: Callable[[Path], None]
    examples: Examples | None = None
    weights: Artifact | None = None
    """Whose weight file belongs to what is written, where that holds only what lies beside it."""


def dense(run: Run) -> Artifact:
    """Train and commit unless it is done (called on every rank; rank 0 writes), as all that follow."""

    def start() -> Start:
        model = run.backbone.model()
        return Start(trainable(model, task_of(run.config).loss), partial(save_trained_on, model, run.backbone))

    return _train(run, JobName("dense"), start)


def dense_wide(run: Run) -> Artifact:
    """The same with a wider FFN."""

    def start() -> Start:
        torch.manual_seed(derived_seed(run.config.seed, "dense_wide weights"))
        backbone = run.backbone
        wide = widened(backbone.tensors, backbone.values, run.config.assembly.experts_per_token)
        learns = trainable(wide.model, task_of(run.config).loss, weights=wide.weights)
        return Start(learns, partial(save_trained_on, wide.model, backbone))

    return _train(run, JobName("dense_wide"), start)


def joint(run: Run) -> Artifact:
    """The mixture whose router is trained with it."""

    def start() -> Start:
        mixture = _joint_mixture(run)
        return Start(_routed(run, mixture), partial(save_mixture, mixture.model, run.backbone))

    return _train(run, JobName("joint"), start)


def joint_evidence(run: Run) -> Artifact:
    """The mixture that is routed by evidence; there is no loss of a router, since none is trained.

    Where the assembled model's experts have embeddings and a head of their own, this one's have them too.
    """

    def start() -> Start:
        mixture, tables, parts = without_rows(_joint_mixture(run)), _tables(run), run.config.own_row_parts
        mixture = with_own_rows(mixture, run.config.experts.count, parts) if parts else mixture
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / TABLES_NAME
            path.write_bytes(tables)
            model = with_text_router(mixture.model, path)

        def save(folder: Path) -> None:
            save_mixture(model, run.backbone, folder)
            (folder / TABLES_NAME).write_bytes(tables)
            if model.own_rows is not None:
                dtype = run.backbone.tensors[names.EMBEDDING].dtype
                save_tensors({name: t.to(dtype) for name, t in learned_rows(model).items()}, folder / OWN_ROWS_NAME)

        # Tables send all layers the same way, so that an expert may get no token of a rank's batch in any of them.
        learns = trainable(model, task_of(run.config).loss, may_skip_parameters=True, weights=mixture.weights)
        return Start(learns, save)

    return _train(run, JobName("joint_evidence"), start)


def joint_lora(run: Run) -> Artifact:
    """One adapter of the experts' shape."""
    return _joint_lora(run, "joint_lora", times=1)


def joint_lora_wide(run: Run) -> Artifact:
    """One adapter of as many times their rank as there are experts, with the same scale."""
    return _joint_lora(run, "joint_lora_wide", times=run.config.experts.count)


def _joint_lora(run: Run, name: TrainedOnAll, times: int) -> Artifact:
    config, lora = run.config, run.config.experts.lora

    def start() -> Start:
        backbone, shape, steps = run.backbone, shape_of(lora), config.baseline_phase(name).steps
        shape = shape.with_rank(times * shape.rank)
        torch.manual_seed(derived_seed(config.seed, f"{name} weights"))
        model, seed = backbone.model(), derived_seed(config.seed, f"{name} dropout")
        # A phase ends at the same share of the training as the experts' does.
        phases = stretched(phases_of(lora, config.experts.steps, model.config.layers), steps / config.experts.steps)
        found = adapters(model, shape, task_of(config).loss, phases, seed)
        return Start(found, partial(write_beside, model, shape, backbone.artifact), weights=backbone.artifact)

    return _train(run, JobName(name), start)


def _routed(run: Run, mixture: Deferred) -> Trainable:
    losses = task_of(run.config).loss, run.config.experts.z_loss, run.config.joint.balance_loss
    return replace(routed(mixture.model, *losses), weights=mixture.weights)


def _joint_mixture(run: Run) -> Deferred:
    config, backbone = run.config, run.backbone
    torch.manual_seed(derived_seed(config.seed, "joint weights"))
    shape = config.joint_experts, config.assembly.experts_per_token
    return joint_mixture(backbone.tensors, backbone.values, *shape, config.joint.freeze_shared)


def _tables(run: Run) -> bytes:
    """The text router's file, as it would be for experts that were trained on these partitions."""
    config, backbone = run.config, run.backbone
    special, size = special_tokens(backbone.artifact), int(backbone.values["vocab_size"])
    streams = [partition_tokens(run.require("partition"), k).tokens for k in range(config.experts.count)]
    counts = [counts_of(config, tokens, size, special) for tokens in streams]
    texts = counted_texts(backbone.artifact, counts, config.learns_responses)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / TABLES_NAME
        write_tables(path, texts, config.joint_experts > config.experts.count, config.assembly.token_pairs)
        return path.read_bytes()


def branch(run: Run, index: int) -> Artifact:
    """One branch of BTX: the whole backbone trained on, alone, on one partition."""
    task = task_of(run.config)

    def start() -> Start:
        model, examples = run.backbone.model(), task.part(run.config, run.require("partition"), index)

        def save(folder: Path) -> None:
            save_trained_on(model, run.backbone, folder)
            device = next(model.parameters()).device
            with measuring(run.config.training, device):
                statistics = task.statistics(model, examples, device)
            save_statistics(folder / STATISTICS_NAME, statistics)

        return Start(trainable(model, task.loss), save, examples)

    return _train(run, JobName("branch", index), start)


def btx(run: Run) -> Artifact:
    """The merged branches, trained on."""
    config = run.config

    def start() -> Start:
        mixture = merged_branches(solved_router(config), run.backbone, run.require_each("branch"))
        choose_trained(mixture.model, config.btx.trains)
        return Start(_routed(run, mixture), partial(save_mixture, mixture.model, run.backbone))

    return _train(run, JobName("btx"), start, skipped_windows=config.experts.steps * config.experts.batch_size)


def choose_trained(model: Decoder, trains: str) -> None:
    """Let only those parameters require gradients that `btx.trains` names."""
    for name, weight in model.named_parameters():
        is_expert = names.expert_position(name) is not None
        weight.requires_grad_(trains == "all" or names.is_gate(name) or (trains == "shared" and not is_expert))


def _train(run: Run, name: JobName, start: Callable[[], Start], skipped_windows: int = 0) -> Artifact:
    """Train a baseline and commit it: on examples of its own, or else on all partitions mixed.

    Of each partition, windows are then taken after the first `skipped_windows`.
    """
    plan, config, task = run.plan(name.stage, name.index), run.config, task_of(run.config)
    if found := run.finished(plan):
        logger.info("%s baseline is finished: %s", name, plan.url)
        return found
    phase, held_out = _phase(config, name.stage), task.validation(config, run.corpus)
    job = Job.of_run(config, str(name), phase, plan.fingerprint)
    begun = start()
    examples = begun.examples
    if examples is None:
        examples = task.mixture(config, run.require("partition"), name.stage, phase, skipped_windows)
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        losses = fit(begun.trainable, examples, job, partial(mean_loss, begun.trainable.model, held_out, world), world)
        with in_company(begun.trainable.model, world.total):
            if world.is_main:
                with making(plan) as writer:
                    begun.save(writer.folder)
                    if begun.weights:
                        take_weights(begun.weights, writer)
                    steps = int(losses.get("steps") or phase.steps)
                    facts = {"training_tokens": steps * phase.batch_size * config.model.context_length}
                    commit(writer, plan, run, {**losses, **facts})
        world.barrier()
    return run.made(name.stage, name.index)


def take_weights(artifact: Artifact, writer: ArtifactWriter) -> None:
    """Take over a model's weight file, without moving its bytes where that can be."""
    if not writer.link(WEIGHTS_NAME, artifact.file_url(WEIGHTS_NAME), artifact.entry(WEIGHTS_NAME)):
        shutil.copyfile(artifact.local_file(WEIGHTS_NAME), writer.folder / WEIGHTS_NAME)


def _phase(config: Config, name: str) -> Any:
    phase = STAGES[name].phase
    assert phase is not None
    return phase(config)
