"""Divide the training documents among the experts: which documents, not where their tokens go.

Every method returns one sorted array of document indices per partition, the same for the same seed; together they hold
every document. `clustered` is in clusters.py, writing the partitions in partition_files.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modularforge.data.token_files import TokenFile
from modularforge.errors import ConfigError, DataError

Indices = npt.NDArray[np.int64]
# Token ids looked up at once, to bound memory on a large corpus.
CHUNK_TOKENS = 1 << 22
OVERLAP_STREAM = 1


def random_partitions(lengths: Indices, count: int, seed: int) -> list[Indices]:
    """Documents drawn by the seed, as many tokens in each partition as documents allow."""
    return split_by_tokens(np.random.default_rng(seed).permutation(len(lengths)), lengths, count)


def curriculum_partitions(documents: TokenFile, vocab_size: int, count: int) -> list[Indices]:
    """Equal shares of the tokens by difficulty: partition 0 has the easiest documents, the last the hardest."""
    order = np.argsort(document_difficulty(documents, vocab_size), kind="stable")
    return split_by_tokens(order, documents.lengths, count)


def domain_partitions(labels: npt.NDArray[np.uint16], names: list[str], count: int) -> list[Indices]:
    """One partition per label, in the order of the labels; raises ConfigError when there are not `count` of them."""
    present = np.unique(labels)
    if len(present) != count:
        found = ", ".join(names[label] for label in present)
        raise ConfigError(
            f"experts.count must be the number of labels for partition.method domain ({len(present)}: {found}), "
            f"but is {count}; set experts.count to {len(present)} or choose another method"
        )
    return [np.flatnonzero(labels == label) for label in present]


def split_by_tokens(order: Indices, lengths: Indices, count: int) -> list[Indices]:
    """Cut an order of documents into `count` runs of nearly equal tokens, none empty."""
    require_documents(len(order), count)
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    cuts = np.searchsorted(middles, np.arange(1, count) * lengths.sum() / count)
    # One document may outweigh a whole share: still leave at least one document to every partition.
    ranks = np.arange(1, count)
    cuts = np.maximum.accumulate(np.maximum(cuts, ranks) - ranks) + ranks
    cuts = np.minimum(cuts, len(order) - count + ranks)
    return [np.sort(part) for part in np.split(order, cuts)]


def add_overlap(partitions: list[Indices], ratio: float, seed: int) -> list[Indices]:
    """Give every partition documents of the others that amount to `ratio` of its own, drawn by the seed."""
    everything = np.unique(np.concatenate(partitions))
    return [_with_guests(own, everything, ratio, [seed, OVERLAP_STREAM, k]) for k, own in enumerate(partitions)]


def document_difficulty(documents: TokenFile, vocab_size: int) -> npt.NDArray[np.float64]:
    """Mean surprisal in bits of each document's tokens under their frequencies in all documents."""
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(documents.tokens), CHUNK_TOKENS):
        counts_V += np.bincount(documents.tokens[start : start + CHUNK_TOKENS], minlength=vocab_size)
    surprisal_V = -np.log2(np.maximum(counts_V, 1) / max(counts_V.sum(), 1))
    difficulty = np.empty(documents.num_documents)
    for first, end in document_chunks(documents.offsets):
        bounds = documents.offsets[first : end + 1]
        bits = surprisal_V[documents.tokens[bounds[0] : bounds[-1]]]
        difficulty[first:end] = np.add.reduceat(bits, bounds[:-1] - bounds[0]) / np.diff(bounds)
    return difficulty


def document_chunks(offsets: Indices, chunk_tokens: int = CHUNK_TOKENS) -> list[tuple[int, int]]:
    """Ranges of documents of about `chunk_tokens` tokens, each of at least one document."""
    chunks, first = [], 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + chunk_tokens, side="right")) - 1
        chunks.append((first, max(end, first + 1)))
        first = chunks[-1][1]
    return chunks


def require_documents(documents: int, count: int) -> None:
    """Raise DataError when there are fewer documents than partitions, so that one would be empty."""
    if documents < count:
        raise DataError(
            f"the training split must have at least one document for each of the {count} partitions, "
            f"but has {documents}; lower experts.count or add text"
        )


def _with_guests(own: Indices, everything: Indices, ratio: float, seed: list[int]) -> Indices:
    others = np.setdiff1d(everything, own, assume_unique=True)
    count = min(round(ratio * len(own)), len(others))
    guests = np.random.default_rng(seed).choice(others, count, replace=False)
    return np.sort(np.concatenate([own, guests]))
