"""Merge backbone and experts into one Hugging Face model folder, streaming their bytes."""

from __future__ import annotations

from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.log import logger
from modularforge.pipeline import finished, plan_stage, require
from modularforge.provenance import commit, making


def run(config: Config) -> None:
    """Assemble and commit unless it is done."""
    plan = plan_stage(config, "assembled")
    if finished(plan):
        logger.info("assembled model is finished: %s", plan.url)
        return
    backbone = require(config, "backbone")
    experts = [require(config, "expert", index) for index in range(config.experts.count)]
    with making(plan) as writer:
        commit(writer, plan, config, assemble(config, backbone, experts, writer.folder))
