"""Write the partitions of a prepared corpus: a token file and a list of documents for each expert, and a summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from modularforge.config import Config
from modularforge.data.partition import (
    CHUNK_TOKENS,
    Indices,
    Known,
    add_everywhere,
    add_overlap,
    divide,
    require_documents,
)
from modularforge.data.token_files import (
    ROW_NAME,
    TokenFile,
    check_metadata,
    open_token_file,
    write_documents,
    write_spans,
)
from modularforge.data.token_streams import SpannedTokens, StreamedTokens, let_go
from modularforge.errors import DataError
from modularforge.log import logger

Place = Callable[[int], AbstractContextManager[Path | None]]
"""Where a partition is written, while it is; None where it is there already."""


def make_partitions(
    config: Config,
    corpus_folder: Path,
    output: Path,
    known: Known | None = None,
    documents: TokenFile | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """Divide the training documents of a prepared corpus among `config.experts.count` partitions.

    Writes token files `partition-K`, document indices `partition-K.documents.npy` and `partitions.json` into `output`
    and returns what the last one says. `known` is what tasks have found out of clusters, `documents` the training
    documents where they are not in the folder. With a `place` each partition goes there, with a file of what is said of
    it. Of documents in shards no token is copied. Raises ConfigError or DataError when a partition would be empty.
    """
    documents = documents or open_token_file(corpus_folder, "train")
    metadata = check_metadata((corpus_folder / "metadata.json").read_bytes(), str(corpus_folder / "metadata.json"))
    names, vocab_size = metadata["labels"], metadata["vocab_size"]
    _require_known(documents, names, vocab_size)
    require_documents(documents.num_documents, config.experts.count)
    partitions, top_words = divide(config, documents, corpus_folder, names, vocab_size, known)
    partitions = add_overlap(partitions, config.partition.overlap_ratio, config.preparation_seed)
    everywhere = config.partition.everywhere
    if everywhere:
        partitions = add_everywhere(partitions, documents.labels, names, everywhere)
    rows = []
    for number, indices in enumerate(partitions):
        rows.append(_describe(documents, indices, names) | ({"top_words": top_words[number]} if top_words else {}))
        with place(number) if place else nullcontext(output) as folder:
            if folder is not None:
                _write_partition(documents, indices, folder, f"partition-{number}", vocab_size)
            if folder is not None and place:
                (folder / ROW_NAME).write_text(json.dumps(rows[-1], ensure_ascii=False) + "\n", encoding="utf-8")
        logger.info("partition %d: %d documents, %d tokens", number, rows[-1]["documents"], rows[-1]["tokens"])
    settings = config.partition.model_dump(exclude=None if everywhere else {"everywhere"})  # files before it had none
    summary = {"seed": config.preparation_seed, **settings, "partitions": rows}
    (output / "partitions.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _require_known(documents: TokenFile, names: list[str], vocab_size: int) -> None:
    """Labels and tokens must be those of metadata.json; a changed bit in a file shows here, not in a job on a GPU."""
    in_memory = not isinstance(documents.tokens, StreamedTokens)  # shards are known by their hashes
    for start in range(0, len(documents.tokens) if in_memory else 0, CHUNK_TOKENS):
        if (largest := int(documents.tokens[start : start + CHUNK_TOKENS].max())) >= vocab_size:
            raise DataError(
                f"tokens of the {documents.name} documents must be below {vocab_size}, but one is {largest}; run "
                "prepare-data again"
            )
        let_go(documents.tokens)
    if documents.num_documents and int(documents.labels.max()) >= len(names):
        raise DataError(
            f"labels of the {documents.name} documents must be below the {len(names)} in metadata.json, but one is "
            f"{int(documents.labels.max())}; run prepare-data again"
        )


def _write_partition(documents: TokenFile, indices: Indices, output: Path, name: str, vocab_size: int) -> None:
    np.save(output / f"{name}.documents.npy", indices.astype("<i8"))
    tokens: Any = documents.tokens
    if isinstance(tokens, SpannedTokens):
        write_spans(documents, indices, output, name)
    else:
        write_documents(documents, indices, output, name, vocab_size)


def _describe(documents: TokenFile, indices: Indices, names: list[str]) -> dict[str, Any]:
    lengths, labels = documents.lengths[indices], documents.labels[indices]
    tokens_by_label = np.bincount(labels, weights=lengths, minlength=len(names)).astype(np.int64)
    return {
        "documents": len(indices),
        "tokens": int(lengths.sum()),
        "tokens_by_label": {name: int(tokens) for name, tokens in zip(names, tokens_by_label, strict=True)},
    }
