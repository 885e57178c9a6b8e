"""One branch of the BTX baseline (arXiv 2403.07816): the whole backbone trained on, alone, on one partition."""

from __future__ import annotations

from modularforge.artifacts import Backbone, Corpus, even_streams
from modularforge.config import Config
from modularforge.experts.trainable import trainable
from modularforge.log import logger
from modularforge.pipeline import finished, job_name, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.routing.statistics import STATISTICS_NAME, save_statistics
from modularforge.tasks.task import task_of
from modularforge.training.backbone_job import save_trained_on
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss


def run(config: Config, index: int) -> None:
    """Train and commit branch `index` unless it is done (called on every rank; rank 0 writes)."""
    plan, name = plan_stage(config, "branch", index), job_name("branch", index)
    if finished(plan):
        logger.info("%s is finished: %s", name, plan.url)
        return
    corpus, backbone = Corpus(require(config, "corpus")), Backbone(require(config, "backbone"))
    task = task_of(config)
    examples = task.part(config, require(config, "partitions"), index)
    phase, context = config.experts, config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, name, phase, plan.fingerprint)
    model = backbone.model().float()
    with joined_world() as world:

        def validate() -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        losses = fit(trainable(model, task.loss), examples, job, validate, world)
        if world.is_main:
            with making(plan) as writer:
                save_trained_on(model, backbone, writer.folder)
                save_statistics(writer.folder / STATISTICS_NAME, task.statistics(model, examples, world.device))
                commit(writer, plan, config, {**losses, "training_tokens": phase.steps * phase.batch_size * context})
        world.barrier()
