"""Clean the documents: by one process, or by tasks pass after pass, whose work is put together here."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from checkpoints import Artifact, ArtifactWriter
from modularforge.data.clean_shares import find_copies_of_all, first_share, join_cleaned, next_share
from modularforge.data.cleaning import clean_corpus, prepare_steps
from modularforge.data.inputs import (
    SOURCES_FACT,
    file_states,
    list_matches,
    record,
    require_unchanged,
    warn_of_changes,
    warn_of_repeats,
)
from modularforge.data.pieces import Listing, list_pieces, plan_units, share_of, warn_of_large
from modularforge.data.prepare import describe_corpus, own_scratch, remove_scratch, scratch_folder
from modularforge.log import logger
from modularforge.pipeline import CLEANING, STAGES
from modularforge.provenance import commit, making
from modularforge.run import Run
from modularforge.shared_work import remove_parts, take


def cleaned(run: Run) -> Artifact:
    """Clean the documents, or put together what tasks have cleaned, unless that is done."""
    plan, config = run.plan("clean"), run.config
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("cleaned documents are finished: %s", plan.url)
        remove_scratch(scratch)
        remove_parts(run, *CLEANING)
        warn_of_changes(config, artifact)
        return artifact
    matches = list_matches(config)
    noted = run.artifact("inventory") if config.cleaning_tasks else None
    states = Listing.read(noted, matches).states if noted else file_states(matches)
    with making(plan) as writer:
        start = time.perf_counter()
        if noted:
            report = _put_together(run, writer)
        else:
            warn_of_repeats(matches)
            work = own_scratch(scratch, describe_corpus(config, None, states))
            report = clean_corpus(config, work, writer.folder, states)
            require_unchanged(states)
        facts = {name: report[name] for name in ("read", "kept", "copies")}
        facts["seconds"] = round(time.perf_counter() - start, 3)
        made = commit(writer, plan, run, {**facts, SOURCES_FACT: record(matches, states)})
    remove_scratch(scratch)
    remove_parts(run, *CLEANING)
    return made


def _put_together(run: Run, writer: ArtifactWriter) -> dict[str, Any]:
    count = run.config.whole_corpus_steps
    passes = [run.require_each(f"filter_{number}") for number in range(count + 1)]
    copies = [run.require(f"copies_{number + 1}") for number in range(count)]
    return join_cleaned(run.config, passes, copies, writer.folder, partial(take, writer))


def inventory(run: Run) -> Artifact:
    """Note which files tasks will clean, and what decontamination looks for, unless that is done."""
    plan, config = run.plan("inventory"), run.config
    if artifact := run.artifact("clean") or run.finished(plan):
        logger.info("the files are noted: %s", artifact.url)
        return artifact
    matches = list_matches(config)
    warn_of_repeats(matches)
    states = file_states(matches)
    with making(plan) as writer:
        prepare_steps(config, writer.folder)
        Listing.write(states, writer.folder)
        warn_of_large(list_pieces(config, Listing(states), None), config.cleaning_tasks or 1)
        return commit(writer, plan, run, {})


def filtered(run: Run, index: int, number: int = 0) -> Artifact:
    """Take one task's share of the documents through a pass of cleaning, unless that is done."""
    stage, config = f"filter_{number}", run.config
    if artifact := run.artifact("clean"):
        logger.info("cleaned documents are finished: %s", artifact.url)
        return artifact
    plan = run.plan(stage, index)
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("share %d is cleaned: %s", index, artifact.url)
        remove_scratch(scratch)
        return artifact
    noted = run.require("inventory")
    before = (run.require(f"filter_{number - 1}", index), run.require(f"copies_{number}")) if number else None
    with making(plan) as writer:
        start, sets = time.perf_counter(), noted.local_folder()
        work = own_scratch(scratch, plan.fingerprint)
        if before:
            documents = next_share(config, *before, number, index, sets, work, writer.folder)
        else:
            documents = _read_share(run, noted, index, work, writer)
        seconds = round(time.perf_counter() - start, 3)
        made = commit(writer, plan, run, {"seconds": seconds, "documents": documents})
    remove_scratch(scratch)
    return made


def _read_share(run: Run, noted: Artifact, index: int, work: Any, writer: ArtifactWriter) -> int:
    """The first pass, which reads files: those of its share must be as they were noted, before and after."""
    listing = Listing.read(noted, list_matches(run.config))
    units = plan_units(list_pieces(run.config, listing, None))
    own = share_of(units, index, len(STAGES["filter_0"].indices(run.config)))
    files = dict.fromkeys(piece.file for unit in own for piece in unit.pieces if piece.file)
    listing.require_unchanged(files, noted)
    documents = first_share(run.config, own, index, noted.local_folder(), work, writer.folder)
    listing.require_unchanged(files, noted)
    return documents


def copies(run: Run, number: int) -> Artifact:
    """Find the copies among what all tasks have left of the pass before, unless that is done."""
    if artifact := run.artifact("clean"):
        logger.info("cleaned documents are finished: %s", artifact.url)
        return artifact
    plan = run.plan(f"copies_{number}")
    if artifact := run.finished(plan):
        logger.info("the copies are found: %s", artifact.url)
        return artifact
    parts, scratch = run.require_each(f"filter_{number - 1}"), scratch_folder(plan.url, plan.fingerprint)
    with making(plan) as writer:
        start, work = time.perf_counter(), own_scratch(scratch, plan.fingerprint)
        removed = find_copies_of_all(run.config, parts, number, work, writer.folder)
        seconds = round(time.perf_counter() - start, 3)
        made = commit(writer, plan, run, {"seconds": seconds, "removed": removed})
    remove_scratch(scratch)
    return made
