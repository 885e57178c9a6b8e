"""Prepare the data: tokenizer and token files, then the partitions of the experts."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from checkpoints import Artifact, paths
from modularforge.config import Config
from modularforge.data.partition_files import make_partitions
from modularforge.data.prepare import prepare_corpus
from modularforge.log import logger
from modularforge.pipeline import finished, plan_stage, require
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making


def run(config: Config) -> Artifact:
    """Make what is missing of corpus and partitions; returns the corpus."""
    _prepare_corpus(config)
    _make_partitions(config)
    return require(config, "corpus")


def _prepare_corpus(config: Config) -> None:
    plan = plan_stage(config, "corpus")
    if finished(plan):
        logger.info("data is finished: %s", plan.url)
        return
    scratch = _scratch_folder(plan.url, plan.fingerprint)
    with making(plan) as writer:
        start = time.perf_counter()
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        metadata = prepare_corpus(config, scratch, writer.folder, pretrained)
        seconds = round(time.perf_counter() - start, 3)
        commit(writer, plan, config, {"seconds": seconds, "labels": metadata["labels"], "splits": metadata["splits"]})
    shutil.rmtree(scratch, ignore_errors=True)


def _make_partitions(config: Config) -> None:
    plan = plan_stage(config, "partitions")
    if finished(plan):
        logger.info("partitions are finished: %s", plan.url)
        return
    corpus = require(config, "corpus")
    with making(plan) as writer:
        start = time.perf_counter()
        summary = make_partitions(config, corpus.local_folder(), writer.folder)
        seconds = round(time.perf_counter() - start, 3)
        commit(
            writer,
            plan,
            config,
            {"seconds": seconds, "method": summary["method"], "partitions": len(summary["partitions"])},
        )


def _scratch_folder(url: str, fingerprint: str) -> Path:
    """A folder that a killed and repeated preparation finds again."""
    if paths.is_local(url):
        target = paths.local_path(url)
        return target.with_name(f"{target.name}.partial")
    return Path(tempfile.gettempdir()) / f"modularforge-prepare-{fingerprint}"
