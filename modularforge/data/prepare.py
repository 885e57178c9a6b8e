"""Turn a corpus into what training reads: one tokenizer, token files of three splits, and `metadata.json`.

Work in progress lies in a scratch folder and survives a kill: the same call continues it and writes the same bytes.
Scratch of other settings, or of files that changed meanwhile, is discarded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Tokenizer

from checkpoints import paths
from checkpoints.redact import redact_values
from checkpoints.screen import progress
from modularforge.config import Config
from modularforge.data.chat_template import chat_tokenizer
from modularforge.data.clean_shards import read_cleaned
from modularforge.data.corpus import SPLITS, Document, Split, read_documents
from modularforge.data.examples import ExampleEncoder, ExampleWriter, example_writers
from modularforge.data.held_out import leave_out_copies
from modularforge.data.inputs import file_states, list_matches
from modularforge.data.shards import Shard, tokenise
from modularforge.data.token_files import LABEL_LIMIT, TokenFile, TokenFileWriter, open_token_file
from modularforge.data.tokenizer import (
    EOS,
    adopt_tokenizer,
    load_tokenizer,
    save_tokenizer,
    take_bytes,
    token_byte_lengths,
    train_tokenizer,
    vocabulary_size,
)
from modularforge.errors import DataError
from modularforge.log import logger

# Raise it when the same settings and files give other tokens.
FORMAT = 1
SCRATCH_PATTERN = "prepare-*"
READ_LATER = ("packing", "mix", "temperature")  # how training reads what was prepared


def prepare_corpus(
    config: Config,
    scratch: Path,
    output: Path,
    pretrained: Path | None = None,
    states: Mapping[str, list[Any]] | None = None,
    cleaned: Path | None = None,
) -> dict[str, Any]:
    """Write tokenizer, token files `train`, `validation`, `test` and `metadata.json` into `output`.

    Returns what the last says, and how many near duplicates of held-out documents there were.

    The tokenizer is learned, or taken from the model folder `pretrained`. `states` are those of the files, if known.
    Documents are those of the folder `cleaned`, or as the sources have them. `scratch` must be the same folder when a
    killed run is repeated; the caller deletes it once `output` is committed.
    """
    work = own_scratch(scratch, describe_corpus(config, pretrained, states))
    encoder = open_encoder(config, output, *make_tokenizer(config, work, output, pretrained, cleaned))
    dropped: Counter[str] = Counter()

    def shards(split: Split) -> Iterator[Shard]:
        documents = _documents(config, split, encoder.writers, cleaned, dropped if split == "train" else None)
        return encoder.tokenise(documents, work, split)

    return write_corpus(config, output, encoder, shards, dropped)


def make_tokenizer(
    config: Config, work: Path, output: Path, pretrained: Path | None, cleaned: Path | None
) -> tuple[Tokenizer, int]:
    """Write the tokenizer into `output`, learned or that of `pretrained`; returns it and the id of its end of text."""
    if pretrained is not None:
        return adopt_tokenizer(pretrained, output)
    tokenizer = _learn_tokenizer(config, work / "tokenizer.json", cleaned)
    save_tokenizer(tokenizer, output)
    return tokenizer, EOS


def open_encoder(config: Config, folder: Path, tokenizer: Tokenizer, end_token: int) -> Encoder:
    """How documents become tokens with the tokenizer of a folder."""
    writers = example_writers(config, folder if config.model.pretrained else None)
    chat = chat_tokenizer((folder / "tokenizer.json").read_bytes()) if writers else None
    return Encoder(tokenizer, end_token, writers, ExampleEncoder(tokenizer, chat, end_token) if chat else None)


def write_corpus(
    config: Config,
    output: Path,
    encoder: Encoder,
    shards: Callable[[Split], Iterator[Shard]],
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    """Write token files of all splits and `metadata.json` beside the tokenizer; return the last.

    `dropped` is complete when the last shard was given.
    """
    labels = names_of_sources(config)
    splits = {split: write_split(split, shards(split), encoder, output, labels) for split in SPLITS}
    files = {split: open_token_file(output, split) for split in SPLITS}
    return finish_corpus(config, output, encoder, labels, splits, files, dropped)


def names_of_sources(config: Config) -> list[str]:
    """The first labels: those of sources whose documents have no others."""
    return [source.name for source in config.data.sources if source.label_field is None]


def finish_corpus(
    config: Config,
    output: Path,
    encoder: Encoder,
    labels: list[str],
    splits: dict[Split, dict[str, dict[str, int]]],
    files: Mapping[Split, TokenFile],
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    """Leave copies of held-out documents out of training and write `metadata.json`, behind the token files."""
    copies = leave_out_copies(config, output, files, labels, splits, token_byte_lengths(encoder.tokenizer))
    metadata = {
        "vocab_size": vocabulary_size(encoder.tokenizer),
        "end_token": encoder.end_token,
        "seed": config.preparation_seed,
        "labels": labels,
        "splits": splits,
        "dropped_documents": dict(sorted(dropped.items())),
        "sources": redact_values([source.model_dump() for source in config.data.sources]),
    }
    (output / "metadata.json").write_text(json.dumps(metadata, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {**metadata, "near_copies": copies}


@dataclass(frozen=True)
class Encoder:
    """How records become documents, and documents tokens."""

    tokenizer: Tokenizer
    end_token: int
    writers: Mapping[str, ExampleWriter]
    examples: ExampleEncoder | None

    def tokenise(self, documents: Iterable[Document], work: Path, name: str) -> Iterator[Shard]:
        """Shards of documents; `work` is where those of an unfinished run lie, under this name."""
        return tokenise(documents, self.tokenizer, work, name, self.end_token, self.examples)


def describe_corpus(
    config: Config, pretrained: Path | None = None, states: Mapping[str, list[Any]] | None = None
) -> str:
    """A hash of the data settings, of the names, sizes and times of the files they name, and of a given tokenizer."""
    files = file_states(list_matches(config)) if states is None else states
    facts: dict[str, Any] = {"format": FORMAT, "data": config.data.model_dump(exclude={*READ_LATER}), "files": files}
    facts["tokenizers"] = tokenizers.__version__
    if config.learns_responses:
        facts["task"] = config.task
    if pretrained is not None:
        facts["tokenizer"] = hashlib.sha256((pretrained / "tokenizer.json").read_bytes()).hexdigest()
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def scratch_folder(url: str, fingerprint: str) -> Path:
    """A folder beside what is made, or among temporary files, that a killed and repeated preparation finds again."""
    if paths.is_local(url):
        target = paths.local_path(url)
        return target.with_name(f"{target.name}.partial")
    return Path(tempfile.gettempdir()) / f"modularforge-prepare-{fingerprint}"


def remove_scratch(scratch: Path) -> None:
    """Remove what preparations left; a folder of that name may be somebody's, so nothing else in it is touched."""
    for work in scratch.glob(SCRATCH_PATTERN):
        shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):  # it is not there, or holds something else
        scratch.rmdir()


def own_scratch(scratch: Path, key: str) -> Path:
    """The scratch folder of these settings; those of others are deleted."""
    for other in scratch.glob(SCRATCH_PATTERN):
        if other.name != f"prepare-{key}":
            shutil.rmtree(other)
    work = scratch / f"prepare-{key}"
    work.mkdir(parents=True, exist_ok=True)
    return work


def _learn_tokenizer(config: Config, path: Path, cleaned: Path | None) -> Tokenizer:
    if not path.exists():
        logger.info("learning a tokenizer of %d entries", config.data.vocab_size)
        tokenizer = train_tokenizer(_sample_texts(config, cleaned), config.data.vocab_size)
        paths.write_atomically(path, [tokenizer.to_str().encode()], replace=True)
    return load_tokenizer(path)


def _sample_texts(config: Config, cleaned: Path | None) -> Iterator[str]:
    """The beginning of each source's training text, in equal shares of `data.tokenizer_sample_bytes`."""
    share = config.data.tokenizer_sample_bytes // len(config.data.sources)
    writers = example_writers(config, None)
    for number in range(len(config.data.sources)):
        documents = _of_source(config, number, "train", writers, cleaned)
        yield from take_bytes((document.text for document in documents), share)


def write_split(
    name: str, shards: Iterable[Shard], encoder: Encoder, output: Path, labels: list[str]
) -> dict[str, dict[str, int]]:
    """Write one token file and return documents, tokens and bytes by label; labels not seen before join `labels`."""
    totals: dict[str, Counter[str]] = {}
    started, done = time.monotonic(), Counter[str]()
    with (
        TokenFileWriter(output, name, vocabulary_size(encoder.tokenizer), encoder.examples is not None) as writer,
        progress(f"tokenise {name}", None, "documents") as bar,
    ):
        for shard in shards:
            writer.add(shard.tokens, shard.lengths, _global_labels(shard, labels), shard.learned)
            _count(shard, totals)
            done.update(documents=len(shard.lengths), bytes=int(shard.text_bytes.sum()))
            megabytes = done["bytes"] / 1e6
            speed = megabytes / (time.monotonic() - started)
            bar.advance(len(shard.lengths), f"{megabytes:.0f} MB, {speed:.1f} MB/s")
    logger.info("%s: %d documents, %.1f MB, %d tokens", name, done["documents"], done["bytes"] / 1e6, writer.num_tokens)
    return {label: dict(totals[label]) for label in labels if label in totals}


def _documents(
    config: Config,
    split: Split,
    writers: Mapping[str, ExampleWriter],
    cleaned: Path | None,
    dropped: Counter[str] | None,
) -> Iterator[Document]:
    for number in range(len(config.data.sources)):
        yield from _of_source(config, number, split, writers, cleaned, dropped)


def _of_source(
    config: Config,
    number: int,
    split: Split,
    writers: Mapping[str, ExampleWriter],
    cleaned: Path | None,
    dropped: Counter[str] | None = None,
) -> Iterator[Document]:
    if cleaned is not None:
        return read_cleaned(cleaned, number, split)
    source = config.data.sources[number]
    return read_documents(source, split, config.data, dropped, writers.get(source.name))


def _global_labels(shard: Shard, labels: list[str]) -> Any:
    """Label ids of the shard's documents; new labels are appended in alphabetical order, the same on every run."""
    return number_labels(shard.names, labels)[shard.labels]


def number_labels(names: Sequence[str], labels: list[str]) -> npt.NDArray[np.int64]:
    """The place of each name among the labels, to which new ones are appended; raises DataError for too many."""
    labels.extend(name for name in names if name not in labels)
    if len(labels) > LABEL_LIMIT:
        raise DataError(
            f"data.sources must have at most {LABEL_LIMIT} labels, but label_field gives {len(labels)}; "
            "name a column with fewer values"
        )
    return np.array([labels.index(name) for name in names], np.int64)


def _count(shard: Shard, totals: dict[str, Counter[str]]) -> None:
    for index, name in enumerate(shard.names):
        chosen = shard.labels == index
        totals.setdefault(name, Counter()).update(
            documents=int(chosen.sum()),
            tokens=int(shard.lengths[chosen].sum()),
            bytes=int(shard.text_bytes[chosen].sum()),
        )
