"""Calibrate the assembled model on validation data; commit a new model folder if it helps, else the reason why not."""

from __future__ import annotations

from checkpoints import Artifact
from modularforge.calibration.calibrator import calibrate_as_set, write_calibrated
from modularforge.log import logger
from modularforge.model.folder import load_model
from modularforge.model.shards import in_company
from modularforge.pipeline import metrics_url
from modularforge.provenance import commit, making
from modularforge.run import Run
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job

RESULT_NAME = "calibration.json"


def run(run: Run) -> Artifact:
    """Calibrate and commit unless it is done (called on every rank; rank 0 writes)."""
    plan = run.plan("calibrate")
    if found := run.finished(plan):
        logger.info("calibration is finished: %s", plan.url)
        return found
    assembled, job = run.require("assemble"), _job(run, plan.fingerprint)
    with joined_world() as world:
        model = load_model(assembled.local_folder())
        result = calibrate_as_set(model, run.config, run.corpus, run.require("partition"), job, world)
        verdict = "kept" if result.kept else "not kept"
        logger.info("calibration: held-out loss %.4f before, %.4f after: %s", result.before, result.after, verdict)
        with in_company(model, world.total):
            if world.is_main:
                with making(plan) as writer:
                    writer.write_json(RESULT_NAME, result.facts)
                    if result.kept:
                        write_calibrated(assembled, result, writer, run.config.assembly.max_shard_bytes)
                    commit(writer, plan, run, result.facts)
        world.barrier()
    return run.made("calibrate")


def _job(run: Run, fingerprint: str) -> Job:
    config = run.config
    places = (None, metrics_url(config, "calibrate"), config.metrics.tensorboard, tuple(config.metrics.writers))
    tokens = config.calibration.batch_size // config.calibration.accumulation_steps * config.model.context_length
    return Job("calibrate", config.calibration, config.training, fingerprint, *places, tokens=tokens)
