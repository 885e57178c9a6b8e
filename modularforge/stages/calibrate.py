"""Calibrate the assembled model on validation data; commit a new model folder if it helps, else the reason why not."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from checkpoints import Artifact, ArtifactWriter
from checkpoints.hashing import describe_file
from checkpoints.safetensors import INDEX_NAME, read_spans
from modularforge.artifacts import Corpus, derived_seed
from modularforge.assembly import parts
from modularforge.assembly.card import CARD_NAME, calibration_note
from modularforge.assembly.plan import OutputTensor, output_tensors, plan_merge, plan_parts
from modularforge.assembly.stream import execute
from modularforge.calibration.calibrator import Calibration, calibrate, even_mixture, split_documents
from modularforge.config import Config
from modularforge.errors import DataError
from modularforge.log import logger
from modularforge.model.folder import load_model, save_tensors
from modularforge.model.hub_config import write_json
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


def write_calibrated(assembled: Artifact, result: Calibration, writer: ArtifactWriter, max_shard_bytes: int) -> None:
    """Stream the assembled weights to the writer, with the calibrated tensors in place of the old ones."""
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch) / "changed.safetensors"
        save_tensors({name: tensor.contiguous() for name, tensor in result.tensors.items()}, changed)
        tensors = output_tensors(
            {
                tensor: span
                for name, entry in assembled.manifest.files.items()
                if name.endswith(".safetensors")
                for tensor, span in read_spans(assembled.file_url(name), entry.tensors).items()
            }
        )
        for name, span in read_spans(str(changed), describe_file(changed).tensors).items():
            tensors[name] = OutputTensor(span, tensors[name].dtype)
        if parts.KEYS_FACT in assembled.manifest.facts:
            sources = parts.parts_of(assembled)
            plan, _, _ = parts.write_parts(
                plan_parts(parts.group(tensors)), writer, sources, must_link=False, max_shard_bytes=max_shard_bytes
            )
        else:
            plan = plan_merge(tensors, max_shard_bytes)
            execute(plan, writer)
    if plan.index:
        write_json(writer.folder / INDEX_NAME, plan.index)
    for name in assembled.manifest.files:
        if not name.endswith(".safetensors") and name != INDEX_NAME:
            shutil.copyfile(assembled.local_file(name), writer.folder / name)
    with open(writer.folder / CARD_NAME, "a", encoding="utf-8") as card:
        card.write(calibration_note(result.before, result.after))
