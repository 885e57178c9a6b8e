"""Divide the training documents among the experts: which documents, not where their tokens go.

Every method returns one sorted array of document indices per partition, the same for the same seed; together they hold
every document. Writing the partitions is in partition_files.py.

By content: k-means over hashed TF-IDF, or over sentence embeddings. Texts come from decoding the token file, so the
corpus is not read twice; of a long document the beginning stands for the whole. k-means is fitted on a sample and the
other documents are assigned to its centres batch by batch. Text without blanks (Chinese, Japanese, Thai, DNA) has no
words to count: each document would be a word of its own. Where the sample holds enough of it, such documents also count
runs of 2 to 4 characters; others are not affected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoints.screen import progress
from modularforge.config import Config, PartitionConfig
from modularforge.data.token_files import TokenFile
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import ConfigError, DataError

Indices = npt.NDArray[np.int64]
# Token ids looked up at once, to bound memory on a large corpus.
CHUNK_TOKENS = 1 << 22
OVERLAP_STREAM = 1
Features = npt.NDArray[np.float32]
Encoder = Callable[[list[str]], Features]
# Of each document; bounds memory and time, and a topic shows early.
DOCUMENT_TOKENS = 1024
BATCH_DOCUMENTS = 512
HASHED_WORDS = 1 << 16
# Characters for each word between blanks: 6 in English, 8 in German or code, 30 and more without blanks.
LONG_WORDS = 20
# Of the sampled documents; fewer are the odd base64 or minified file, which may be clusters as they were.
WORDLESS_SHARE = 0.05
RUN_LENGTHS = (2, 3, 4)
DIMENSIONS = 100
TOP_WORDS = 12
WORD = r"(?u)\b\w\w+\b"  # scikit-learn's own
TOP_WORD = r"(?u)\b[^\W\d_]{3,}\b"


def divide(
    config: Config,
    documents: TokenFile,
    corpus_folder: Path,
    names: list[str],
    vocab_size: int,
    known: Known | None = None,
) -> tuple[list[Indices], list[list[str]]]:
    """The documents of each partition by `partition.method`, before overlap, and the top words of clusters.

    `known` is what tasks have found out of clusters.
    """
    count, method = config.experts.count, config.partition.method
    if method == "random":
        return random_partitions(documents.lengths, count, config.preparation_seed), []
    if method == "curriculum":
        return curriculum_partitions(documents, vocab_size, count), []
    if method == "domain":
        return domain_partitions(documents.labels, names, count, config.partition.everywhere), []
    clusters = cluster_documents(
        documents, load_tokenizer(corpus_folder), count, config.partition, config.preparation_seed, known
    )
    return clusters.partitions, clusters.top_words


def random_partitions(lengths: Indices, count: int, seed: int) -> list[Indices]:
    """Documents drawn by the seed, as many tokens in each partition as documents allow."""
    return split_by_tokens(np.random.default_rng(seed).permutation(len(lengths)), lengths, count)


def curriculum_partitions(documents: TokenFile, vocab_size: int, count: int) -> list[Indices]:
    """Equal shares of the tokens by difficulty: partition 0 has the easiest documents, the last the hardest."""
    order = np.argsort(document_difficulty(documents, vocab_size), kind="stable")
    return split_by_tokens(order, documents.lengths, count)


def domain_partitions(
    labels: npt.NDArray[np.uint16], names: list[str], count: int, everywhere: Sequence[str] = ()
) -> list[Indices]:
    """One partition per label, in the order of the labels, but for those that all partitions get.

    Raises ConfigError when there are not `count` of them.
    """
    present = np.array([label for label in np.unique(labels) if names[label] not in everywhere], np.int64)
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


def add_everywhere(
    partitions: list[Indices], labels: npt.NDArray[np.uint16], names: list[str], everywhere: Sequence[str]
) -> list[Indices]:
    """Give every partition all documents of these labels; raises ConfigError for an unknown one, and where a partition
    would have nothing else.
    """
    if unknown := [label for label in everywhere if label not in names]:
        raise ConfigError(
            f"partition.everywhere must name labels of the data ({', '.join(names):.200}), but names "
            f"{unknown[0]!r:.60}; name one of these"
        )
    guests = np.flatnonzero(np.isin(labels, [names.index(label) for label in everywhere]))
    for number, own in enumerate(partitions):
        if not len(np.setdiff1d(own, guests, assume_unique=True)):
            raise ConfigError(
                f"partition.everywhere must leave every partition some text of its own, but partition {number} has "
                f"only {', '.join(everywhere):.200}; lower experts.count, or name less"
            )
    return [np.union1d(own, guests) for own in partitions] if len(guests) else partitions


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


@dataclass(frozen=True)
class Clusters:
    """Documents of each cluster, and the words that set its sampled documents apart from the others."""

    partitions: list[Indices]
    top_words: list[list[str]]


@dataclass(frozen=True)
class Fit:
    """Centres [K, D], the cluster of each document of the sample, what sets clusters apart, how texts are placed."""

    centres: Features
    sample_clusters: Indices
    top_words: list[list[str]]
    encode: Encoder
    arrays: dict[str, npt.NDArray[Any]]
    """What `restored_encoder` makes `encode` of."""


@dataclass(frozen=True)
class Known:
    """What tasks have found out: the fit, and the cluster of each document, or -1."""

    fit: Fit
    clusters: Indices


def cluster_documents(
    documents: TokenFile,
    tokenizer: Tokenizer,
    count: int,
    settings: PartitionConfig,
    seed: int,
    known: Known | None = None,
) -> Clusters:
    """Assign every document to one of `count` clusters; deterministic by seed, never an empty cluster."""
    require_documents(documents.num_documents, count)
    sample = draw_sample(documents.num_documents, count, settings, seed)
    with one_thread():
        fit = (
            fit_clusters(texts_of(documents, tokenizer, sample), documents.lengths[sample], count, settings, seed)
            if known is None
            else known.fit
        )
        clusters = np.full(documents.num_documents, -1, np.int64) if known is None else known.clusters.copy()
        clusters[sample] = fit.sample_clusters
        with progress("assign clusters", len(clusters) - len(sample), "documents") as bar:
            for batch in batches_of_others(len(clusters), sample):
                if (clusters[batch] < 0).any():
                    clusters[batch] = nearest(fit, texts_of(documents, tokenizer, batch))
                bar.advance(len(batch))
    return Clusters([np.flatnonzero(clusters == cluster) for cluster in range(count)], fit.top_words)


def draw_sample(num_documents: int, count: int, settings: PartitionConfig, seed: int) -> Indices:
    """The documents that k-means is fitted on, sorted."""
    size = min(num_documents, max(settings.cluster_sample_documents, count))
    return np.sort(np.random.default_rng(seed).choice(num_documents, size, replace=False))


def batches_of_others(num_documents: int, sample: Indices) -> Iterator[Indices]:
    """All other documents, in the batches in which they are assigned: in others, sums may differ in the last bit."""
    others = np.setdiff1d(np.arange(num_documents), sample, assume_unique=True)
    return (others[start : start + BATCH_DOCUMENTS] for start in range(0, len(others), BATCH_DOCUMENTS))


def fit_clusters(texts: list[str], lengths: Indices, count: int, settings: PartitionConfig, seed: int) -> Fit:
    """Fit an encoder and k-means on the texts of a sample; `lengths` are their tokens."""
    encode, arrays = _fit_encoder(texts, settings.cluster_encoder, seed)
    centres, clusters = _fit_centres(_encode_in_batches(encode, texts), lengths, count, seed)
    return Fit(centres, clusters, _top_words(texts, clusters, count), encode, arrays)


def nearest(fit: Fit, texts: list[str]) -> Indices:
    """The cluster of each text of a batch."""
    return _nearest(fit.encode(texts), fit.centres)


def one_thread() -> AbstractContextManager[Any]:
    """Sums over several threads differ in the last bit, which can move a document between runs."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1)
    return limits


def texts_of(documents: TokenFile, tokenizer: Tokenizer, indices: Indices) -> list[str]:
    """The beginnings of these documents."""
    texts: list[str] = []
    for start in range(0, len(indices), BATCH_DOCUMENTS):
        ids = [documents.document(int(index))[:DOCUMENT_TOKENS].tolist() for index in indices[start:][:BATCH_DOCUMENTS]]
        texts += tokenizer.decode_batch(ids, skip_special_tokens=True)
    return texts


def _fit_encoder(texts: list[str], name: str, seed: int) -> tuple[Encoder, dict[str, npt.NDArray[Any]]]:
    return _fit_tfidf(texts, seed) if name == "tfidf" else (_load_sentence_encoder(name), {})


def restored_encoder(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Encoder:
    """An encoder that was fitted in another process."""
    if name != "tfidf":
        return _load_sentence_encoder(name)
    pipeline = _tfidf(bool(arrays["by_words"]), len(arrays["components"]), 0)
    pipeline[1].idf_, pipeline[2].components_ = arrays["idf"], arrays["components"]
    return _encoding(pipeline)


def _is_wordless(text: str) -> bool:
    return len(text) > LONG_WORDS * len(text.split())


def _has_words(texts: list[str]) -> bool:
    return sum(map(_is_wordless, texts)) < WORDLESS_SHARE * len(texts)


def _analyzer(by_words: bool, pattern: str) -> dict[str, Any]:
    """How vectorizers take documents apart: by words, or also by characters where the sample has too few words."""
    if by_words:
        return {"token_pattern": pattern}
    find_words = re.compile(pattern).findall

    def analyze(text: str) -> list[str]:
        text = text.lower()
        words: list[str] = find_words(text)
        if _is_wordless(text):
            words = [word for word in words if len(word) <= LONG_WORDS]
            words += [text[i : i + length] for length in RUN_LENGTHS for i in range(len(text) - length + 1)]
        return words

    return {"analyzer": analyze}


def _fit_tfidf(texts: list[str], seed: int) -> tuple[Encoder, dict[str, npt.NDArray[Any]]]:
    by_words = _has_words(texts)
    pipeline = _tfidf(by_words, min(DIMENSIONS, len(texts)), seed)
    pipeline.fit(texts)
    arrays = {"by_words": np.array(by_words), "idf": pipeline[1].idf_, "components": pipeline[2].components_}
    return _encoding(pipeline), arrays


def _tfidf(by_words: bool, dimensions: int, seed: int) -> Any:
    """Hashed words, weighted by rarity, reduced to at most 100 dimensions (latent semantic analysis), unit length."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    return make_pipeline(
        HashingVectorizer(
            **_analyzer(by_words, WORD), n_features=HASHED_WORDS, alternate_sign=False, norm=None, dtype=np.float32
        ),
        TfidfTransformer(sublinear_tf=True),
        TruncatedSVD(dimensions, random_state=seed),
        Normalizer(),
    )


def _encoding(pipeline: Any) -> Encoder:
    def encode(batch: list[str]) -> Features:
        features: Features = pipeline.transform(batch).astype(np.float32)
        return features

    return encode


def _load_sentence_encoder(name: str) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"partition.cluster_encoder must be tfidf or the name of an installed sentence encoder, but is {name} and "
            "sentence-transformers is missing; run pip install 'modularforge[embeddings]'"
        ) from error
    model = SentenceTransformer(name)

    def encode(batch: list[str]) -> Features:
        features: Features = model.encode(batch, normalize_embeddings=True, show_progress_bar=False)
        return features

    return encode


def _encode_in_batches(encode: Encoder, texts: list[str]) -> Features:
    starts = range(0, len(texts), BATCH_DOCUMENTS)
    return np.concatenate([encode(texts[start : start + BATCH_DOCUMENTS]) for start in starts])


def _fit_centres(features: Features, lengths: Indices, count: int, seed: int) -> tuple[Features, Indices]:
    """Centres [K, D], and the cluster of each sampled document; no cluster is empty.

    Documents weigh as many as their tokens: experts train on tokens, and a domain of many short documents would
    otherwise take several centres (ten domains of 8 MB each: 0.96 of the tokens in pure clusters, 0.74 unweighted).
    """
    from sklearn.cluster import KMeans

    fitted: Any = KMeans(count, n_init=4, random_state=seed).fit(features, sample_weight=lengths.astype(float))
    return fitted.cluster_centers_, _fill_empty(fitted.labels_.astype(np.int64), count)


def _fill_empty(clusters: Indices, count: int) -> Indices:
    """Give each empty cluster (identical documents make them) a document of the largest one."""
    for cluster in range(count):
        if not (clusters == cluster).any():
            largest = np.bincount(clusters, minlength=count).argmax()
            clusters[np.flatnonzero(clusters == largest)[-1]] = cluster
    return clusters


def _nearest(features: Features, centres: Features) -> Indices:
    """The nearest centre of each row: the one with the least |c|^2 - 2 x.c."""
    distances_NK = (centres**2).sum(axis=1) - 2 * features @ centres.T
    nearest: Indices = distances_NK.argmin(axis=1)
    return nearest


def _top_words(texts: list[str], clusters: Indices, count: int) -> list[list[str]]:
    """Words that more documents of a cluster have than of the whole sample, by the weighted log ratio of the shares."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(**_analyzer(_has_words(texts), TOP_WORD), max_features=20_000, binary=True)
    try:
        present = vectorizer.fit_transform(texts)
    except ValueError:  # not a single word
        return [[] for _ in range(count)]
    words = vectorizer.get_feature_names_out()
    overall = np.asarray(present.mean(axis=0)).ravel()
    top = []
    for cluster in range(count):
        share = np.asarray(present[clusters == cluster].mean(axis=0)).ravel()
        score = share * np.log((share + 1e-3) / (overall + 1e-3))
        top.append([str(words[index]) for index in np.argsort(-score, kind="stable")[:TOP_WORDS]])
    return top
