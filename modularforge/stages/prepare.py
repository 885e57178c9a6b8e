"""Prepare the data: cleaned documents where wanted, tokenizer and token files, then the partitions of the experts."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints import Artifact, paths
from modularforge.config import Config
from modularforge.data.cleaning import clean_corpus
from modularforge.data.cluster_shares import assign_share, fit_on_sample, known_clusters
from modularforge.data.inputs import (
    SHOWN,
    changes_since,
    file_states,
    list_matches,
    record,
    require_unchanged,
    warn_of_repeats,
)
from modularforge.data.partition_files import make_partitions
from modularforge.data.parts import (
    FILES_NAME,
    Listing,
    list_pieces,
    put_together,
    share_of,
    write_part,
)
from modularforge.data.prepare import (
    Encoder,
    describe_corpus,
    make_tokenizer,
    open_encoder,
    own_scratch,
    prepare_corpus,
    remove_scratch,
    scratch_folder,
)
from modularforge.data.token_files import open_token_file
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import DataError, StoreError
from modularforge.log import logger
from modularforge.pipeline import STAGES, JobName, contents
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making
from modularforge.run import Run

END_TOKEN_FACT = "end_token"  # in that of the vocabulary
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
        require_unchanged(states)
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
        _remove_parts(run, "vocabulary", "tokenise")
        _warn_of_changes(config, artifact)
        return artifact
    matches = [] if source else list_matches(config)
    warn_of_repeats(matches)
    parts = _parts(run)
    if source:
        states = {source.url: [contents(source)]}
    elif parts:  # as they were when the vocabulary was learned
        states = Listing.read(run.require("vocabulary"), matches).states
    else:
        states = file_states(matches)
    documents = source.local_folder() if source and not parts else None
    with making(plan) as writer:
        start = time.perf_counter()
        if parts:
            metadata = _put_together(run, parts, writer.folder)
        else:
            metadata = prepare_corpus(config, scratch, writer.folder, _pretrained(config), states, documents)
            require_unchanged({} if source else states)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"seconds": seconds, **{name: metadata[name] for name in ("labels", "splits", "near_copies")}}
        read = {} if source else {SOURCES_FACT: record(matches, states)}
        made = commit(writer, plan, run, {**facts, **read})
    remove_scratch(scratch)
    _remove_parts(run, "vocabulary", "tokenise")
    return made


def vocabulary(run: Run) -> Artifact:
    """Learn the tokenizer of a corpus that tasks will share, and note which files it has, unless that is done."""
    plan, config = run.plan("vocabulary"), run.config
    if artifact := run.artifact("prepare-data") or run.finished(plan):
        logger.info("the vocabulary is learned: %s", artifact.url)
        return artifact
    source = run.require("clean") if config.data.clean else None
    matches = [] if source else list_matches(config)
    states = file_states(matches)
    scratch = scratch_folder(plan.url, plan.fingerprint)
    with making(plan) as writer:
        pretrained, documents = _pretrained(config), source.local_folder() if source else None
        work = own_scratch(scratch, describe_corpus(config, pretrained, states))
        _, end_token = make_tokenizer(config, work, writer.folder, pretrained, documents)
        Listing.write(states, writer.folder)
        made = commit(writer, plan, run, {END_TOKEN_FACT: end_token})
    remove_scratch(scratch)
    return made


def tokenised(run: Run, index: int) -> Artifact:
    """Read and tokenise one task's share of the corpus, unless that is done."""
    if artifact := run.artifact("prepare-data"):
        logger.info("data is finished: %s", artifact.url)
        return artifact
    plan, config = run.plan("tokenise", index), run.config
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("share %d is finished: %s", index, artifact.url)
        remove_scratch(scratch)
        return artifact
    noted, cleaned = run.require("vocabulary"), run.require("clean") if config.data.clean else None
    listing = Listing.read(noted, [] if cleaned else list_matches(config))
    count = len(STAGES["tokenise"].indices(config))
    own = share_of(list_pieces(config, listing, cleaned), index, count)
    files = [] if cleaned else [piece.file for piece in own if piece.file]
    listing.require_unchanged(files, noted)
    with making(plan) as writer:
        start, folder = time.perf_counter(), noted.local_folder()
        work = own_scratch(scratch, plan.fingerprint)
        counts = write_part(config, _encoder(config, noted, folder), own, work, writer.folder, cleaned)
        seconds = round(time.perf_counter() - start, 3)
        made = commit(writer, plan, run, {"seconds": seconds, "documents": counts, "files": len(own)})
    remove_scratch(scratch)
    return made


def centres(run: Run) -> Artifact:
    """Fit clusters on a sample of the training documents, unless that is done."""
    plan = run.plan("centres")
    if artifact := run.artifact("partition") or run.finished(plan):
        logger.info("the clusters are fitted: %s", artifact.url)
        return artifact
    folder = run.require("prepare-data").local_folder()
    with making(plan) as writer:
        fit_on_sample(run.config, open_token_file(folder, "train"), load_tokenizer(folder), writer.folder)
        return commit(writer, plan, run, {})


def assigned(run: Run, index: int) -> Artifact:
    """Assign one task's share of the training documents to clusters, unless that is done."""
    if artifact := run.artifact("partition"):
        logger.info("partitions are finished: %s", artifact.url)
        return artifact
    plan, fitted = run.plan("assign", index), run.require("centres")
    if artifact := run.finished(plan):
        logger.info("share %d is assigned: %s", index, artifact.url)
        return artifact
    folder = run.require("prepare-data").local_folder()
    documents, tokenizer = open_token_file(folder, "train"), load_tokenizer(folder)
    with making(plan) as writer:
        assign_share(run.config, documents, tokenizer, fitted, index, writer.folder)
        return commit(writer, plan, run, {})


def _encoder(config: Config, noted: Artifact, folder: Path) -> Encoder:
    return open_encoder(config, folder, load_tokenizer(folder), int(noted.manifest.facts[END_TOKEN_FACT]))


def _parts(run: Run) -> list[Artifact]:
    """What tasks have made of their shares; none where nobody shares the work, or nobody has begun."""
    count = run.config.cluster.prepare_tasks
    if not count or run.artifact("vocabulary") is None:
        return []
    return run.require_each("tokenise")


def _put_together(run: Run, parts: list[Artifact], output: Path) -> dict[str, Any]:
    """The corpus of what all tasks have made."""
    noted = run.require("vocabulary")
    folder = noted.local_folder()
    for name in noted.manifest.files:
        if name != FILES_NAME:
            shutil.copyfile(folder / name, output / name)
    return put_together(run.config, _encoder(run.config, noted, folder), parts, output)


def _remove_parts(run: Run, *stages: str) -> None:
    """Remove what tasks have made, which is in the whole now: a share before what it was made from."""
    if not run.config.cluster.prepare_tasks:
        return
    folder = run.url("vocabulary").rpartition("/")[0]
    for name in sorted(paths.list_folder(folder), key=lambda name: JobName.parse(name).index is None):
        if JobName.parse(name).stage in stages:
            paths.remove(paths.join(folder, name))
            run.forget(paths.join(folder, name))
    if paths.is_local(folder):
        with suppress(OSError):  # it holds something else
            paths.local_path(folder).rmdir()


def _pretrained(config: Config) -> Path | None:
    return local_model(config.model.pretrained) if config.model.pretrained else None


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
        _remove_parts(run, "centres", "assign")
        return found
    fitted = run.artifact("centres") if run.config.clustering_tasks else None
    shares = run.require_each("assign") if fitted else []
    with making(plan) as writer:
        start, folder = time.perf_counter(), run.require("prepare-data").local_folder()
        documents = open_token_file(folder, "train")
        known = known_clusters(run.config, documents, fitted, shares) if fitted else None
        summary = make_partitions(run.config, folder, writer.folder, known)
        facts = {"method": summary["method"], "partitions": len(summary["partitions"])}
        made = commit(writer, plan, run, {"seconds": round(time.perf_counter() - start, 3), **facts})
    _remove_parts(run, "centres", "assign")
    return made
