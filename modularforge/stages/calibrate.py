"""Calibrate the assembled model on validation data; commit a new model folder if it helps, else the reason why not."""

from __future__ import annotations

from checkpoints import Artifact
from modularforge.artifacts import Corpus, derived_seed
from modularforge.calibration.calibrator import Calibration, calibrate, even_mixture, split_documents, write_calibrated
from modularforge.config import Config
from modularforge.errors import DataError
from modularforge.log import logger
from modularforge.model.folder import load_model
from modularforge.pipeline import finished, metrics_url, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.training.distributed import default_device
from modularforge.training.job import Job

RESULT_NAME = "calibration.json"


def run(config: Config) -> None:
    """Calibrate and commit unless it is done."""
    plan = plan_stage(config, "calibrated")
    if finished(plan):
        logger.info("calibration is finished: %s", plan.url)
        return
    assembled, corpus = require(config, "assembled"), Corpus(require(config, "corpus"))
    result = _calibrate(config, assembled, corpus, plan.fingerprint)
    facts = {"kept": result.kept, "loss_before": result.before, "loss_after": result.after}
    logger.info(
        "calibration: held-out loss %.4f before, %.4f after: %s",
        result.before,
        result.after,
        "kept" if result.kept else "not kept",
    )
    with making(plan) as writer:
        writer.write_json(RESULT_NAME, facts)
        if result.kept:
            write_calibrated(assembled, result, writer, config.assembly.max_shard_bytes)
        commit(writer, plan, config, facts)


def _calibrate(config: Config, assembled: Artifact, corpus: Corpus, fingerprint: str) -> Calibration:
    fit_half, decide_half = split_documents(corpus.tokens("validation"), corpus.labels)
    if not fit_half:
        raise DataError(
            "calibration needs at least two validation documents of a domain, but there are fewer; add validation text "
            "or leave it out (assemble --no-calibrate, run-all --skip-calibration)"
        )
    model = load_model(assembled.local_folder()).to(default_device())
    places = (None, metrics_url(config, "calibration"), config.metrics.tensorboard)
    job = Job("calibration", config.calibration, config.training, fingerprint, *places)
    seed = derived_seed(config.seed, "calibration order")
    return calibrate(model, config, even_mixture(fit_half), decide_half, corpus.byte_lengths, job, seed)
