"""Merge backbone and experts into one Hugging Face model folder, streaming their bytes."""

from __future__ import annotations

import time

from checkpoints import find_artifact, paths
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.log import logger
from modularforge.pipeline import finished, plan_stage, require, stage_url
from modularforge.provenance import commit, making


def run(config: Config) -> None:
    """Assemble and commit unless it is done."""
    plan = plan_stage(config, "assembled")
    if finished(plan):
        logger.info("assembled model is finished: %s", plan.url)
        return
    backbone = require(config, "backbone")
    experts = [require(config, "expert", k) for k in range(config.experts.count) if f"expert-{k}" in plan.inputs]
    old = find_artifact(plan.url)
    if old:
        logger.info("more experts are finished than the model at %s was made from; it is made again", plan.url)
    with making(plan, [backbone, *experts]) as writer:
        start = time.perf_counter()
        facts = assemble(config, backbone, experts, writer, old)
        if old:  # only now, so that a run that fails before keeps the old model
            paths.remove(stage_url(config, "calibrated"))
        commit(writer, plan, config, {"seconds": round(time.perf_counter() - start, 3), **facts}, old)
