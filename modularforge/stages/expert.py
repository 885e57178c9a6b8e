"""Train one expert alone: it reads the backbone and its own partition, and nothing of any other expert."""

from __future__ import annotations

import time

from checkpoints import Artifact
from modularforge.experts.job import save_expert, train_expert
from modularforge.experts.kind import ExpertJob
from modularforge.log import logger
from modularforge.pipeline import JobName
from modularforge.provenance import commit, making, save_settings
from modularforge.run import Run
from modularforge.stage_outputs import own_domains
from modularforge.tasks.task import examples_taken, task_of
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job


def run(run: Run, index: int) -> Artifact:
    """Train and commit expert `index` unless it is done (called on every rank; rank 0 writes)."""
    config, name = run.config, JobName("expert", index)
    plan = run.plan("expert", index)
    if found := run.finished(plan):
        logger.info("%s is finished: %s", name, plan.url)
        return found
    partitions, task = run.require("partitions"), task_of(config)
    examples = task.part(config, partitions, index)
    held_out = task.validation(config, run.corpus, dict(enumerate(own_domains(partitions))).get(index, []))
    job = Job.of_run(config, str(name), config.experts, plan.fingerprint)
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        expert = ExpertJob(config, index, run.backbone, task, examples, world.device)
        start = time.perf_counter()
        model, losses = train_expert(expert, held_out, job, world)
        seconds = round(time.perf_counter() - start, 3)
        if world.is_main:
            with making(plan) as writer:
                facts = save_expert(expert, model, writer.folder)
                taken = examples_taken(examples, int(losses.get("steps") or config.experts.steps))
                commit(writer, plan, run, {**losses, **facts, **taken, "training_seconds": seconds})
        world.barrier()
    return run.made("expert", index)
