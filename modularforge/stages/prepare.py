"""Prepare the data: cleaned documents where wanted, tokenizer and token files, then the partitions of the experts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import Artifact, ArtifactWriter, find_artifact, open_artifact, write_artifact
from checkpoints.parallel import in_order
from modularforge.config import Config
from modularforge.data.cluster_shares import assign_share, fit_on_sample, known_clusters
from modularforge.data.inputs import (
    LOOKS_AT_ONCE,
    SOURCES_FACT,
    file_states,
    list_matches,
    record,
    require_unchanged,
    warn_of_changes,
    warn_of_repeats,
)
from modularforge.data.partition_files import Place, make_partitions
from modularforge.data.parts import join_shards, put_together, write_part, write_shards
from modularforge.data.pieces import (
    FILES_NAME,
    Listing,
    PlannedShard,
    list_pieces,
    plan_shards,
    share_of,
    warn_of_large,
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
from modularforge.data.token_files import TokenFile
from modularforge.data.tokenizer import load_tokenizer
from modularforge.log import logger
from modularforge.pipeline import STAGES, Plan, contents
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making
from modularforge.run import Run
from modularforge.shared_work import remove_parts, take
from modularforge.stored_tokens import EACH_FACT, IDENTITIES_NAME, PLACE_FACT, partition_identity, token_file

END_TOKEN_FACT = "end_token"  # in that of the vocabulary
MOST_TOGETHER = 256  # partitions in one artifact, whose manifest every expert reads; of more each is its own


def corpus(run: Run) -> Artifact:
    """Learn the tokenizer and write the token files, unless that is done."""
    plan, config = run.plan("prepare-data"), run.config
    source = run.require("clean") if config.data.clean else None
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if artifact := run.finished(plan):
        logger.info("data is finished: %s", plan.url)
        remove_scratch(scratch)  # of a preparation that was killed right after its commit
        remove_parts(run, "vocabulary", "tokenise")
        warn_of_changes(config, artifact)
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
        planned = plan_shards(list_pieces(config, Listing(states), source))
        if parts:
            metadata = _put_together(run, parts, planned, writer)
        elif planned:
            key = describe_corpus(config, _pretrained(config), states)
            metadata = _in_shards(run, planned, own_scratch(scratch, key), writer, source)
        else:
            metadata = prepare_corpus(config, scratch, writer.folder, _pretrained(config), states, documents)
        if not parts:
            require_unchanged({} if source else states)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"seconds": seconds, **{name: metadata[name] for name in ("labels", "splits", "near_copies")}}
        read = {} if source else {SOURCES_FACT: record(matches, states)}
        made = commit(writer, plan, run, {**facts, **read})
    remove_scratch(scratch)
    remove_parts(run, "vocabulary", "tokenise")
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
        warn_of_large(list_pieces(config, Listing(states), source), config.cluster.prepare_tasks or 1)
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
    pieces = list_pieces(config, listing, cleaned)
    shards = share_of(planned, index, count) if (planned := plan_shards(pieces)) else None
    own = share_of(pieces, index, count) if shards is None else [piece for shard in shards for piece in shard.pieces]
    files = [] if cleaned else list(dict.fromkeys(piece.file for piece in own if piece.file))
    listing.require_unchanged(files, noted)
    with making(plan) as writer:
        start, folder = time.perf_counter(), noted.local_folder()
        work = own_scratch(scratch, plan.fingerprint)
        encoder = _encoder(config, noted, folder)
        if shards is None:
            counts = write_part(config, encoder, own, work, writer.folder, cleaned)
        else:
            counts = write_shards(config, encoder, shards, work, writer.folder, cleaned)
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
    documents, folder = _training_documents(run)
    with making(plan) as writer:
        fit_on_sample(run.config, documents, load_tokenizer(folder), writer.folder)
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
    documents, folder = _training_documents(run)
    tokenizer = load_tokenizer(folder)
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


def _put_together(
    run: Run, parts: list[Artifact], planned: list[PlannedShard], writer: ArtifactWriter
) -> dict[str, Any]:
    """The corpus of what all tasks have made."""
    noted = run.require("vocabulary")
    folder, output = noted.local_folder(), writer.folder
    for name in noted.manifest.files:
        if name != FILES_NAME:
            shutil.copyfile(folder / name, output / name)
    encoder = _encoder(run.config, noted, folder)
    if planned:
        return join_shards(run.config, encoder, planned, parts, output, partial(take, writer))
    return put_together(run.config, encoder, parts, output)


def _in_shards(
    run: Run, planned: list[PlannedShard], work: Path, writer: ArtifactWriter, cleaned: Artifact | None
) -> dict[str, Any]:
    """A large corpus by one process: all shards, which lie in `work` as those of tasks with them, and their index."""
    config, pretrained = run.config, _pretrained(run.config)
    documents = cleaned.local_folder() if cleaned else None
    encoder = open_encoder(config, writer.folder, *make_tokenizer(config, work, writer.folder, pretrained, documents))
    url = str(work / "shards")
    if (part := find_artifact(url)) is None:
        with write_artifact(url, "tokenise", "0" * 32, {}, {}) as own:
            write_shards(config, encoder, planned, work, own.folder, cleaned)
            part = own.commit({})
    return join_shards(config, encoder, planned, [part], writer.folder, partial(take, writer))


def _training_documents(run: Run) -> tuple[TokenFile, Path]:
    """The training documents, and a folder with all else of the prepared data."""
    corpus = run.require("prepare-data")
    names = [name for name in corpus.manifest.files if not name.endswith((".tokens.bin", ".learned.bin"))]
    return token_file(corpus, "train"), corpus.local_folder(names=names)


def _pretrained(config: Config) -> Path | None:
    return local_model(config.model.pretrained) if config.model.pretrained else None


def partitions(run: Run) -> Artifact:
    """Divide the training documents among the experts, unless that is done."""
    plan = run.plan("partition")
    if found := run.finished(plan):
        logger.info("partitions are finished: %s", plan.url)
        remove_parts(run, "centres", "assign")
        return found
    fitted = run.artifact("centres") if run.config.clustering_tasks else None
    shares = run.require_each("assign") if fitted else []
    with making(plan) as writer:
        start, (documents, folder) = time.perf_counter(), _training_documents(run)
        known = known_clusters(run.config, documents, fitted, shares) if fitted else None
        place = _places(plan) if run.config.experts.count > MOST_TOGETHER else None
        summary = make_partitions(run.config, folder, writer.folder, known, documents, place)
        facts = {"method": summary["method"], "partitions": len(summary["partitions"])}
        if place:
            facts[EACH_FACT] = _each_url(plan).rpartition("/")[2]
            urls = [f"{_each_url(plan)}/partition-{k}" for k in range(facts["partitions"])]
            own = in_order(open_artifact, urls, LOOKS_AT_ONCE)
            writer.write_json(IDENTITIES_NAME, [partition_identity(part, k) for k, part in enumerate(own)])
        made = commit(writer, plan, run, {"seconds": round(time.perf_counter() - start, 3), **facts})
    remove_parts(run, "centres", "assign")
    return made


def _each_url(plan: Plan) -> str:
    return f"{plan.url.rstrip('/')}-{plan.fingerprint[:12]}"


def _places(plan: Plan) -> Place:
    """Each of many partitions as an artifact of its own, beside what is said of all; one that is there stays."""

    @contextmanager
    def place(number: int) -> Iterator[Path | None]:
        url = f"{_each_url(plan)}/partition-{number}"
        made = find_artifact(url)
        if made is not None and made.manifest.fingerprint == plan.fingerprint and made.manifest.inputs == plan.inputs:
            yield None
            return
        with write_artifact(url, "partition", plan.fingerprint, plan.settings, plan.inputs) as writer:
            yield writer.folder
            writer.commit({PLACE_FACT: number}, old=made)

    return place
