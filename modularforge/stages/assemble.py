"""Merge backbone and experts into one Hugging Face model folder, streaming their bytes."""

from __future__ import annotations

import time

from checkpoints import Artifact, paths
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.log import logger
from modularforge.pipeline import JobName
from modularforge.provenance import commit, making
from modularforge.ranks import own_rank
from modularforge.run import SECONDS_BETWEEN_LOOKS, Run


def run(run: Run) -> Artifact:
    """Assemble and commit unless it is done (called on every rank; rank 0 assembles)."""
    if own_rank().rank:
        return _awaited(run.config)
    plan, config = run.plan("assemble"), run.config
    if found := run.finished(plan):
        logger.info("assembled model is finished: %s", plan.url)
        return found
    backbone = run.require("backbone")
    indices = [index for index in range(config.experts.count) if str(JobName("expert", index)) in plan.inputs]
    experts = run.require_each("expert", indices)
    old = run.find(plan.url)
    if old:
        logger.info("more experts are finished than the model at %s was made from; it is made again", plan.url)
    with making(plan, [backbone, *experts]) as writer:
        start = time.perf_counter()
        facts = assemble(config, backbone, experts, writer, old)
        if old:  # only now, so that a run that fails before keeps the old model
            paths.remove(run.url("calibrate"))
            run.forget(run.url("calibrate"))
        return commit(writer, plan, run, {"seconds": round(time.perf_counter() - start, 3), **facts}, old)


def _awaited(config: Config) -> Artifact:
    """What rank 0 makes, however long that takes; when it fails, torchrun ends this process too."""
    while (found := Run(config).artifact("assemble")) is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found
