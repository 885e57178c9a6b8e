"""Clusters that tasks find side by side: one fits them on a sample, each of many assigns a share of the documents.

What was fitted is a file, so that all tasks have the very same numbers, and shares are whole batches of one process, in
which sums have the same last bits: the partitions are the same, however many tasks there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from checkpoints import Artifact
from modularforge.config import Config
from modularforge.data.partition import (
    Fit,
    Indices,
    Known,
    batches_of_others,
    draw_sample,
    fit_clusters,
    nearest,
    one_thread,
    require_documents,
    restored_encoder,
    texts_of,
)
from modularforge.data.token_files import TokenFile

FIT_NAME, WORDS_NAME, CLUSTERS_NAME = "fit.npz", "top_words.json", "clusters.npy"


def fit_on_sample(config: Config, documents: TokenFile, tokenizer: Tokenizer, output: Path) -> None:
    """Fit clusters on a sample of the training documents and write what was fitted."""
    require_documents(documents.num_documents, config.experts.count)
    sample = _sample(config, documents)
    with one_thread():
        texts, lengths = texts_of(documents, tokenizer, sample), documents.lengths[sample]
        fit = fit_clusters(texts, lengths, config.experts.count, config.partition, config.preparation_seed)
    arrays: dict[str, Any] = {"centres": fit.centres, "sample_clusters": fit.sample_clusters, **fit.arrays}
    np.savez(output / FIT_NAME, **arrays)
    (output / WORDS_NAME).write_text(json.dumps(fit.top_words, ensure_ascii=False) + "\n", encoding="utf-8")


def assign_share(
    config: Config, documents: TokenFile, tokenizer: Tokenizer, fitted: Artifact, index: int, output: Path
) -> None:
    """Write the cluster of each document in the share of one task, in their order; of the sample nothing."""
    fit, batches = _fit_of(config, fitted), _share(config, documents, index)
    with one_thread():
        found = [nearest(fit, texts_of(documents, tokenizer, batch)) for batch in batches]
    np.save(output / CLUSTERS_NAME, np.concatenate([np.empty(0, np.int64), *found]))


def known_clusters(config: Config, documents: TokenFile, fitted: Artifact, assigned: Sequence[Artifact]) -> Known:
    """What all tasks have found out."""
    clusters = np.full(documents.num_documents, -1, np.int64)
    for index, one in enumerate(assigned):
        own = np.concatenate([np.empty(0, np.int64), *_share(config, documents, index)])
        clusters[own] = np.load(one.local_file(CLUSTERS_NAME))
    return Known(_fit_of(config, fitted), clusters)


def _sample(config: Config, documents: TokenFile) -> Indices:
    return draw_sample(documents.num_documents, config.experts.count, config.partition, config.preparation_seed)


def _share(config: Config, documents: TokenFile, index: int) -> list[Indices]:
    """The batches of one task, neighbours, about as many for each."""
    batches = list(batches_of_others(documents.num_documents, _sample(config, documents)))
    count = config.clustering_tasks or 1
    return batches[index * len(batches) // count : (index + 1) * len(batches) // count]


def _fit_of(config: Config, fitted: Artifact) -> Fit:
    with np.load(fitted.local_file(FIT_NAME)) as content:
        arrays = dict(content)
    encode = restored_encoder(config.partition.cluster_encoder, arrays)
    return Fit(arrays["centres"], arrays["sample_clusters"], fitted.read_json(WORDS_NAME), encode, arrays)
