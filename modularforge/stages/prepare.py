"""Prepare the data: tokenizer and token files, then the partitions of the experts."""

from __future__ import annotations

import time

from checkpoints import Artifact
from modularforge.config import Config
from modularforge.data.inputs import SHOWN, changes_since, file_states, list_matches, record, warn_of_repeats
from modularforge.data.partition_files import make_partitions
from modularforge.data.prepare import prepare_corpus, remove_scratch, scratch_folder
from modularforge.errors import DataError, StoreError
from modularforge.log import logger
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making
from modularforge.run import Run

SOURCES_FACT = "sources"  # in the manifest of prepared data: the files that were read


def corpus(run: Run) -> Artifact:
    """Learn the tokenizer and write the token files, unless that is done."""
    plan, config = run.plan("corpus"), run.config
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("data is finished: %s", plan.url)
        remove_scratch(scratch)  # of a preparation that was killed right after its commit
        _warn_of_changes(config, artifact)
        return artifact
    matches = list_matches(config)
    warn_of_repeats(matches)
    states = file_states(matches)
    with making(plan) as writer:
        start = time.perf_counter()
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        metadata = prepare_corpus(config, scratch, writer.folder, pretrained, states)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"seconds": seconds, "labels": metadata["labels"], "splits": metadata["splits"]}
        made = commit(writer, plan, run, {**facts, SOURCES_FACT: record(matches, states)})
    remove_scratch(scratch)
    return made


def _warn_of_changes(config: Config, artifact: Artifact) -> None:
    """Say so when the files are not those that were read; the prepared data stays what it is."""
    recorded = artifact.manifest.facts.get(SOURCES_FACT)
    try:
        changes = changes_since(recorded, config) if recorded else []
    except (DataError, StoreError) as error:
        changes = [str(error)]
    if changes:
        more = f" (and {len(changes) - SHOWN} more)" if len(changes) > SHOWN else ""
        logger.warning(
            "the sources are not what they were when %s was prepared: %s%s; that data is used as it is: delete "
            "it, or name another --data-dir, to read them again",
            artifact.url,
            "; ".join(changes[:SHOWN]),
            more,
        )


def partitions(run: Run) -> Artifact:
    """Divide the training documents among the experts, unless that is done."""
    plan = run.plan("partitions")
    if found := run.finished(plan):
        logger.info("partitions are finished: %s", plan.url)
        return found
    with making(plan) as writer:
        start = time.perf_counter()
        summary = make_partitions(run.config, run.require("corpus").local_folder(), writer.folder)
        facts = {"method": summary["method"], "partitions": len(summary["partitions"])}
        return commit(writer, plan, run, {"seconds": round(time.perf_counter() - start, 3), **facts})
