"""Calibrate the assembled model on validation data; commit a new model folder if it helps, else the reason why not."""

from __future__ import annotations

from checkpoints import Artifact
from modularforge.calibration.calibrator import Calibration, calibrate_as_set, write_calibrated
from modularforge.log import logger
from modularforge.model.folder import load_model
from modularforge.pipeline import metrics_url
from modularforge.provenance import commit, making
from modularforge.run import Run
from modularforge.training.distributed import default_device
from modularforge.training.job import Job

RESULT_NAME = "calibration.json"


def run(run: Run) -> Artifact:
    """Calibrate and commit unless it is done."""
    plan = run.plan("calibrate")
    if found := run.finished(plan):
        logger.info("calibration is finished: %s", plan.url)
        return found
    assembled = run.require("assemble")
    result = _calibrate(run, assembled, plan.fingerprint)
    logger.info(
        "calibration: held-out loss %.4f before, %.4f after: %s",
        result.before,
        result.after,
        "kept" if result.kept else "not kept",
    )
    with making(plan) as writer:
        writer.write_json(RESULT_NAME, result.facts)
        if result.kept:
            write_calibrated(assembled, result, writer, run.config.assembly.max_shard_bytes)
        return commit(writer, plan, run, result.facts)


def _calibrate(run: Run, assembled: Artifact, fingerprint: str) -> Calibration:
    config = run.config
    places = (None, metrics_url(config, "calibrate"), config.metrics.tensorboard, tuple(config.metrics.writers))
    job = Job("calibrate", config.calibration, config.training, fingerprint, *places)
    model = load_model(assembled.local_folder()).to(default_device())
    return calibrate_as_set(model, config, run.corpus, run.require("partition"), job)
