"""Prepare the data: cleaned documents where wanted, tokenizer and token files, then the partitions of the experts."""

from __future__ import annotations

import time

from checkpoints import Artifact
from modularforge.config import Config
from modularforge.data.cleaning import clean_corpus
from modularforge.data.inputs import SHOWN, changes_since, file_states, list_matches, record, warn_of_repeats
from modularforge.data.partition_files import make_partitions
from modularforge.data.prepare import describe_corpus, own_scratch, prepare_corpus, remove_scratch, scratch_folder
from modularforge.errors import DataError, StoreError
from modularforge.log import logger
from modularforge.pipeline import contents
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making
from modularforge.run import Run

SOURCES_FACT = "sources"  # in the manifest of prepared data: the files that were read


def cleaned(run: Run) -> Artifact:
    """Clean the documents, unless that is done."""
    plan, config = run.plan("clean"), run.config
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("cleaned documents are finished: %s", plan.url)
        remove_scratch(scratch)
        _warn_of_changes(config, artifact)
        return artifact
    matches = list_matches(config)
    warn_of_repeats(matches)
    states = file_states(matches)
    with making(plan) as writer:
        start = time.perf_counter()
        work = own_scratch(scratch, describe_corpus(config, None, states))
        report = clean_corpus(config, work, writer.folder)
        facts = {name: report[name] for name in ("read", "kept", "copies")}
        facts["seconds"] = round(time.perf_counter() - start, 3)
        made = commit(writer, plan, run, {**facts, SOURCES_FACT: record(matches, states)})
    remove_scratch(scratch)
    return made


def corpus(run: Run) -> Artifact:
    """Learn the tokenizer and write the token files, unless that is done."""
    plan, config = run.plan("prepare-data"), run.config
    source = run.require("clean") if config.data.clean else None
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("data is finished: %s", plan.url)
        remove_scratch(scratch)  # of a preparation that was killed right after its commit
        _warn_of_changes(config, artifact)
        return artifact
    matches = [] if source else list_matches(config)
    warn_of_repeats(matches)
    states = {source.url: [contents(source)]} if source else file_states(matches)
    documents = source.local_folder() if source else None
    with making(plan) as writer:
        start = time.perf_counter()
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        metadata = prepare_corpus(config, scratch, writer.folder, pretrained, states, documents)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"seconds": seconds, **{name: metadata[name] for name in ("labels", "splits", "near_copies")}}
        read = {} if source else {SOURCES_FACT: record(matches, states)}
        made = commit(writer, plan, run, {**facts, **read})
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
    plan = run.plan("partition")
    if found := run.finished(plan):
        logger.info("partitions are finished: %s", plan.url)
        return found
    with making(plan) as writer:
        start = time.perf_counter()
        summary = make_partitions(run.config, run.require("prepare-data").local_folder(), writer.folder)
        facts = {"method": summary["method"], "partitions": len(summary["partitions"])}
        return commit(writer, plan, run, {"seconds": round(time.perf_counter() - start, 3), **facts})
