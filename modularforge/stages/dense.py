"""The honest baseline: the backbone trained on, as a dense model, with the very tokens that the experts get."""

from __future__ import annotations

from modularforge.artifacts import Backbone, Corpus, even_streams
from modularforge.config import Config
from modularforge.log import logger
from modularforge.pipeline import finished, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.training.backbone_job import save_trained_on
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import language_loss, mean_loss
from modularforge.training.mixture import mixed_partitions


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan = plan_stage(config, "dense")
    if finished(plan):
        logger.info("dense baseline is finished: %s", plan.url)
        return
    corpus, backbone = Corpus(require(config, "corpus")), Backbone(require(config, "backbone"))
    partitions, phase, context = require(config, "partitions"), config.joint_phase, config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, "dense", phase, plan.fingerprint)
    model = backbone.model().float()
    with joined_world() as world:
        batches_from = mixed_partitions(config, partitions, "dense", world)

        def validate() -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        losses = fit(model, language_loss, job, batches_from, validate, world)
        if world.is_main:
            with making(plan) as writer:
                save_trained_on(model, backbone, writer.folder)
                facts = {"training_tokens": phase.steps * phase.batch_size * context}
                commit(writer, plan, config, {**losses, **facts})
        world.barrier()
