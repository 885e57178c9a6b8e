"""Token files of artifacts, wherever they lie: whole, in shards, or as spans of another artifact's shards.

What is on an object store is fetched once into the cache, a shard when it is first read, or is read by ranges where it
is larger than what shall be kept here. Of many partitions each is an artifact of its own, so that an expert reads what
is said of its own alone, and not of ten thousand.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from checkpoints import Artifact, open_artifact, paths
from checkpoints.errors import CorruptArtifactError
from checkpoints.options import cache_limit
from checkpoints.urls import UnsafeNameError, checked_path
from modularforge.data.ranged_tokens import RangedTokens
from modularforge.data.token_files import (
    ROW_NAME,
    PartitionRow,
    TokenFile,
    id_type,
    open_token_file,
    read_partitions,
    read_row,
    read_shard_counts,
    read_spans,
    shard_name,
    shards_of,
)
from modularforge.data.token_streams import SpannedTokens
from modularforge.errors import DataError
from modularforge.pipeline import STAGES, contents

EACH_FACT = "each"  # of partitions: the folder in which each is an artifact of its own
PLACE_FACT = "partition"  # of one of them: which it is
IDENTITIES_NAME = "identities.json"


def token_file(artifact: Artifact, name: str, apart: bool = False) -> TokenFile:
    """A token file of an artifact, memory-mapped; from an object store its files are fetched first.

    One that is larger there than what shall be kept here (`cache_limit`) is read by ranges. With `apart`, documents of
    text are read one by one.
    """
    files, tokens = artifact.manifest.files, f"{name}.tokens.bin"
    index = [f"{name}.{ending}" for ending in ("offsets.npy", "labels.npy")]
    if f"{name}.spans.npy" in files:
        return replace(_spanned(artifact, name, index), is_apart=apart)
    limit = None if paths.is_local(artifact.url) else cache_limit()
    learned = [f"{name}.learned.bin"] if f"{name}.learned.bin" in files else []
    if limit is None or learned or artifact.entry(tokens).size <= limit:
        folder = artifact.local_folder(names=[tokens, *index, *learned])
        return replace(open_token_file(folder, name), is_apart=apart)
    place, size, most = artifact.file_url(tokens), artifact.entry(tokens).size, limit

    def ranged(count: int) -> Any:
        return RangedTokens([(place, count)], id_type(place, size, count), most)

    return replace(open_token_file(artifact.local_folder(names=index), name, ranged), is_apart=apart)


def partition_tokens(partitions: Artifact, index: int, apart: bool = False) -> TokenFile:
    """The token file of one partition; of many, nothing of the others is read."""
    return token_file(partition_artifact(partitions, index), f"partition-{index}", apart)


def _spanned(artifact: Artifact, name: str, index: list[str]) -> TokenFile:
    """A token file whose tokens are spans of shards, of its own or of the corpus that it divides."""
    is_own = f"{name}.shards.npy" in artifact.manifest.files
    whole, split = (artifact, name) if is_own else (divided_corpus(artifact), "train")
    folder = artifact.local_folder(names=[*index, f"{name}.spans.npy"])
    spans_P2 = read_spans(folder, name)
    learned = None
    if f"{shard_name(split, 0)}.learned.bin" in whole.manifest.files:
        learned = SpannedTokens(shards(whole, split, "learned.bin"), spans_P2)
    return open_token_file(folder, name, lambda _: SpannedTokens(shards(whole, split), spans_P2), learned)


def shards(whole: Artifact, split: str, ending: str = "tokens.bin") -> Any:
    """The shards of a split, one after another, each fetched or mapped when it is first read, or read by ranges."""
    folder = whole.local_folder(names=[f"{split}.shards.npy"])
    counts = read_shard_counts(folder, split)
    names = [f"{shard_name(split, number)}.{ending}" for number in range(len(counts))]
    limit = None if paths.is_local(whole.url) else cache_limit()
    total = sum(whole.entry(name).size for name in names)
    if limit is None or total <= limit or ending != "tokens.bin":
        return shards_of(counts, lambda number: whole.local_file(names[number], verify=False), ending)
    places = [(whole.file_url(name), int(count)) for name, count in zip(names, counts, strict=True)]
    return RangedTokens(places, id_type(whole.url, total, int(counts.sum())), limit)


def divided_corpus(partitions: Artifact) -> Artifact:
    """The prepared data whose shards hold the tokens of partitions; raises DataError where it is another."""
    above = 2 if PLACE_FACT in partitions.manifest.facts else 1  # one of many lies in a folder of its own
    corpus = open_artifact(partitions.url.rstrip("/").rsplit("/", above)[0])
    if partitions.manifest.inputs.get(STAGES["prepare-data"].kind) != contents(corpus):
        raise DataError(
            f"{partitions.url} must divide the data in {corpus.url}, but divides other data; put back what was "
            "prepared, or make the partitions again"
        )
    return corpus


def partition_url(partitions: Artifact, index: int) -> str:
    """Where one of many partitions is an artifact of its own; empty where all of them are in one."""
    folder = partitions.manifest.facts.get(EACH_FACT)
    if folder is None:
        return ""
    try:
        name = checked_path(folder)
    except (UnsafeNameError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{partitions.url} must name the folder of its partitions, but names {folder!r:.80}; make it again"
        ) from error
    return paths.join(partitions.url.rstrip("/").rpartition("/")[0], name, f"partition-{index}")


def partition_artifact(partitions: Artifact, index: int) -> Artifact:
    """The artifact that holds this partition: all of them, or its own."""
    url = partition_url(partitions, index)
    if not url:
        return partitions
    own = open_artifact(url)
    if own.manifest.fingerprint != partitions.manifest.fingerprint:
        raise CorruptArtifactError(f"{url} must be a part of {partitions.url}, but is of another one; make them again")
    return own


def partition_identity(holder: Artifact, index: int) -> str:
    """Identity of the bytes of a partition; of examples, where each begins and what is learned count as well.

    Of spans of shards it is that of the shards and the spans.
    """
    files, name = holder.manifest.files, f"partition-{index}"
    if f"{name}.spans.npy" in files:
        corpus = holder.manifest.inputs.get(STAGES["prepare-data"].kind, "")
        hashes = [corpus, *(holder.entry(f"{name}.{ending}").digest for ending in ("spans.npy", "offsets.npy"))]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:32]
    tokens = holder.entry(f"{name}.tokens.bin").digest
    if f"{name}.learned.bin" not in files:
        return tokens[:32]
    hashes = [tokens, *(files[f"{name}.{ending}"].digest for ending in ("offsets.npy", "learned.bin"))]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:32]


def partition_row(partitions: Artifact, index: int) -> PartitionRow:
    """What is said of one partition; of many its own file says it."""
    holder = partition_artifact(partitions, index)
    if holder is partitions:
        return partition_rows(partitions)[index]
    return read_row(holder.read_bytes(ROW_NAME), holder.file_url(ROW_NAME))


def partition_rows(partitions: Artifact) -> list[PartitionRow]:
    """What partitions.json says of each partition."""
    name = "partitions.json"
    return read_partitions(partitions.read_bytes(name), partitions.file_url(name))
