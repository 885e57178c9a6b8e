"""What all baselines share that one job trains on all partitions at once: the data, the job, and the commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints import Artifact
from modularforge.artifacts import Backbone, Corpus, even_streams
from modularforge.config import Config, PhaseConfig
from modularforge.experts.trainable import Trainable
from modularforge.log import logger
from modularforge.model.backbone import Decoder
from modularforge.pipeline import finished, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.tasks.task import task_of
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss


@dataclass(frozen=True)
class Start:
    """What a baseline trains, and how the trained model is written into a folder."""

    trainable: Trainable
    save: Callable[[Path], None]


def run_mixed(
    config: Config,
    name: str,
    phase: PhaseConfig,
    start: Callable[[Backbone, Artifact], Start],
    skipped_windows: int = 0,
) -> None:
    """Train stage `name` and commit unless it is done (called on every rank; rank 0 writes).

    `start` gets backbone and partitions. Of each partition, windows are taken after the first `skipped_windows`.
    """
    plan = plan_stage(config, name)
    if finished(plan):
        logger.info("%s baseline is finished: %s", name, plan.url)
        return
    corpus, backbone = Corpus(require(config, "corpus")), Backbone(require(config, "backbone"))
    partitions, context = require(config, "partitions"), config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, name, phase, plan.fingerprint)
    begun = start(backbone, partitions)
    with joined_world() as world:
        model, examples = (
            begun.trainable.model,
            task_of(config).mixture(config, partitions, name, phase, skipped_windows),
        )
        assert isinstance(model, Decoder)

        def validate() -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        losses = fit(begun.trainable, examples, job, validate, world)
        if world.is_main:
            with making(plan) as writer:
                begun.save(writer.folder)
                facts = {"training_tokens": phase.steps * phase.batch_size * context}
                commit(writer, plan, config, {**losses, **facts})
        world.barrier()
