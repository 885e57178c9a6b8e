"""Shares of a corpus that tasks read and tokenise side by side, and the same corpus as of one process put together.

What is to be read, all files of all splits in their order, is cut between files into as many shares as there are
tasks; each task writes token files of its own share, with the bytes of each document's text. Put together they are cut
into the shards of one process again, because labels get their numbers in the order in which shards bring them. So no
byte depends on the number of tasks.

A large corpus is not copied together: its pieces are cut into shards, by their sizes alone, each shard is a token file
of its own, a share is some of them, and only their index is put together. Token files stay as tasks wrote them.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from checkpoints import Artifact, paths
from modularforge.config import Config
from modularforge.data import shards
from modularforge.data.clean_shards import read_cleaned_files
from modularforge.data.corpus import SPLITS, Document, Split, read_documents
from modularforge.data.pieces import Piece, PlannedShard, by_attribute, require_documents
from modularforge.data.prepare import (
    Encoder,
    finish_corpus,
    names_of_sources,
    number_labels,
    write_corpus,
    write_split,
)
from modularforge.data.shards import Shard
from modularforge.data.token_files import (
    TokenFile,
    id_type,
    map_part,
    open_token_file,
    read_shard_counts,
    read_spans,
)
from modularforge.data.token_streams import Indices, JoinedTokens, SpannedTokens, let_go

PART_NAME = "part.json"
MOST_OPEN = 4  # shards of an object store that are here at a time while copies are looked for


def write_part(
    config: Config, encoder: Encoder, pieces: Sequence[Piece], work: Path, output: Path, cleaned: Artifact | None
) -> dict[str, int]:
    """Tokenise a share into `output`; `work` must be the same folder when a killed task is repeated.

    Returns the number of documents by split.
    """
    dropped: Counter[str] = Counter()
    found: dict[str, Counter[str]] = {}
    names: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for split, own in by_attribute(pieces, "split"):
        documents = _documents(config, encoder, own, cleaned, dropped, found)
        sizes: list[Any] = []
        noted = _noting(encoder.tokenise(documents, work, split), sizes)
        totals = write_split(split, noted, encoder, output, names.setdefault(split, []))
        np.save(output / f"{split}.text_bytes.npy", np.concatenate(sizes) if sizes else np.empty(0, np.int64))
        counts[split] = sum(total["documents"] for total in totals.values())
    about = {"names": names, "dropped": dropped, "found": found}
    (output / PART_NAME).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def write_shards(
    config: Config,
    encoder: Encoder,
    planned: Sequence[PlannedShard],
    work: Path,
    output: Path,
    cleaned: Artifact | None,
) -> dict[str, int]:
    """Tokenise shards of a large corpus into `output`, each into a token file with its own labels; as `write_part`."""
    dropped: Counter[str] = Counter()
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    rows = []
    for shard in planned:
        names: list[str] = []
        documents = _documents(config, encoder, shard.pieces, cleaned, dropped, found)
        totals = write_split(shard.name, encoder.tokenise(documents, work, shard.name), encoder, output, names)
        rows.append({"name": shard.name, "labels": names, "totals": totals})
        counts[shard.split] += sum(total["documents"] for total in totals.values())
    about = {"shards": rows, "dropped": dropped, "found": found}
    (output / PART_NAME).write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
    return dict(counts)


def join_shards(
    config: Config,
    encoder: Encoder,
    planned: Sequence[PlannedShard],
    parts: Sequence[Artifact],
    output: Path,
    take: Callable[[Artifact, str], Any],
) -> dict[str, Any]:
    """Write the index of shards that tasks have made, and all else of prepared data but the tokenizer.

    `take` gives a file of a task's artifact to what is being made. Labels get their numbers in the order of the shards.
    Raises DataError.
    """
    about = [part.read_json(PART_NAME) for part in parts]
    dropped: Counter[str] = Counter()
    for one in about:
        dropped.update(one["dropped"])
    require_documents(config, about)
    holders = {row["name"]: (part, row) for part, one in zip(parts, about, strict=True) for row in one["shards"]}
    labels = names_of_sources(config)
    splits: dict[Split, dict[str, dict[str, int]]] = {}
    files: dict[Split, TokenFile] = {}
    for split in SPLITS:
        own = [holders[shard.name] for shard in planned if shard.split == split]
        splits[split] = _join_index(split, own, output, labels)
        for part, row in own:
            for name in _tokens_of(part, row["name"]):
                take(part, name)
        files[split] = _opened(split, own, output)
    return finish_corpus(config, output, encoder, labels, splits, files, dropped)


Held = tuple[Artifact, Mapping[str, Any]]
"""A shard: the artifact that holds it, and what its task said of it."""


def _join_index(split: Split, shards: Sequence[Held], output: Path, labels: list[str]) -> dict[str, dict[str, int]]:
    """Write offsets and labels of a split, shard by shard; new labels join `labels`. What it holds by label."""
    totals: dict[str, Counter[str]] = {}
    documents = sum(total["documents"] for _, row in shards for total in row["totals"].values())
    offsets = open_memmap(output / f"{split}.offsets.npy", "w+", "<i8", (documents + 1,))
    numbers = open_memmap(output / f"{split}.labels.npy", "w+", "<u2", (documents,)) if documents else None
    counts, first = [], 0
    offsets[0] = 0
    for part, row in shards:
        own, its_labels = (_loaded(part, f"{row['name']}.{ending}") for ending in ("offsets.npy", "labels.npy"))
        last = first + len(its_labels)
        offsets[first : last + 1] = own + offsets[first]
        places = number_labels(row["labels"], labels)
        if numbers is not None and last > first:
            numbers[first:last] = places[its_labels]
        counts.append(int(own[-1]))
        first = last
        for label, total in row["totals"].items():
            totals.setdefault(label, Counter()).update(total)
    offsets.flush()
    if numbers is None:
        np.save(output / f"{split}.labels.npy", np.empty(0, "<u2"))
    else:
        numbers.flush()
    np.save(output / f"{split}.shards.npy", np.array(counts, "<i8"))
    np.save(output / f"{split}.spans.npy", np.array([[0, sum(counts)]], "<i8"))
    return {label: dict(totals[label]) for label in labels if label in totals}


def _tokens_of(part: Artifact, name: str) -> list[str]:
    """The files of a shard that are no index."""
    return [file for file in (f"{name}.tokens.bin", f"{name}.learned.bin") if file in part.manifest.files]


def _loaded(part: Artifact, name: str) -> Any:
    return np.load(io.BytesIO(part.read_bytes(name)))


def _opened(split: Split, shards: Sequence[Held], output: Path) -> TokenFile:
    """A split whose index lies in `output` and whose tokens lie with the tasks that wrote them."""
    counts, spans_P2 = read_shard_counts(output, split), read_spans(output, split)
    has_learned = any(len(_tokens_of(part, row["name"])) > 1 for part, row in shards)
    tokens = SpannedTokens(_where_they_are(shards, counts, "tokens.bin"), spans_P2)
    learned = SpannedTokens(_where_they_are(shards, counts, "learned.bin"), spans_P2) if has_learned else None
    return open_token_file(output, split, lambda _: tokens, learned)


def _where_they_are(shards: Sequence[Held], counts: Indices, ending: str) -> JoinedTokens:
    """Their files one after another; of an object store a few are here at a time."""
    names = [f"{row['name']}.{ending}" for _, row in shards]
    total = sum(part.entry(name).size for (part, _), name in zip(shards, names, strict=True))
    dtype = id_type(names[0], total, int(counts.sum())) if ending == "tokens.bin" else np.dtype(np.uint8)

    def opened(number: int) -> Any:
        part, name, count = shards[number][0], names[number], int(counts[number])
        if paths.is_local(part.url):
            return map_part(part.local_file(name, verify=False), dtype, count)
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays until nobody reads it
            paths.upload(str(Path(folder) / name), part.stream(name))
            return map_part(Path(folder) / name, dtype, count)

    return JoinedTokens(opened, counts.tolist(), dtype, MOST_OPEN)


def _noting(found: Iterable[Shard], sizes: list[Any]) -> Iterator[Shard]:
    for shard in found:
        sizes.append(shard.text_bytes)
        yield shard


def _documents(
    config: Config,
    encoder: Encoder,
    pieces: Iterable[Piece],
    cleaned: Artifact | None,
    dropped: Counter[str],
    found: dict[str, Counter[str]],
) -> Iterator[Document]:
    for number, own in by_attribute(pieces, "source"):
        split = own[0].split
        files = [(piece.file, piece.span) for piece in own if piece.file is not None]
        if cleaned is not None:
            yield from read_cleaned_files(cleaned.local_file(name) for name, _ in files)
            continue
        source, short = config.data.sources[number], dropped if split == "train" else None
        tally = found.setdefault(f"{split} {number}", Counter())
        writer = encoder.writers.get(source.name)
        yield from read_documents(source, split, config.data, short, writer, files or None, tally)


def put_together(config: Config, encoder: Encoder, parts: Sequence[Artifact], output: Path) -> dict[str, Any]:
    """Write what `prepare_corpus` writes but the tokenizer, from the parts of all tasks; raises DataError."""
    about = [part.read_json(PART_NAME) for part in parts]
    dropped: Counter[str] = Counter()
    for one in about:
        dropped.update(one["dropped"])
    require_documents(config, about)
    names = [one["names"] for one in about]
    return write_corpus(config, output, encoder, lambda split: _joined(parts, names, split), dropped)


def _joined(parts: Sequence[Artifact], names: Sequence[Mapping[str, list[str]]], split: Split) -> Iterator[Shard]:
    """The documents of all parts in the shards in which one process would have tokenised them."""
    held: list[Shard] = []
    filled = 0
    for part, known in zip(parts, names, strict=True):
        if split not in known:
            continue
        with _here(part, split) as folder:
            file, text_bytes = open_token_file(folder, split), np.load(folder / f"{split}.text_bytes.npy")
            ends, first = np.cumsum(text_bytes), 0
            while first < file.num_documents:
                before = ends[first - 1] if first else 0
                end = int(np.searchsorted(ends, before + shards.SHARD_BYTES - filled)) + 1
                held.append(_cut(file, text_bytes, known[split], first, min(end, file.num_documents)))
                let_go(file.tokens)
                filled += int(held[-1].text_bytes.sum())
                first = end
                if filled >= shards.SHARD_BYTES:
                    yield _one(held)
                    held, filled = [], 0
    if held:
        yield _one(held)


@contextmanager
def _here(part: Artifact, split: Split) -> Iterator[Path]:
    """A folder with the files of a split; of an object store a copy, which is gone afterwards."""
    if paths.is_local(part.url):
        yield part.local_folder()
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in part.manifest.files:
            if name.startswith(f"{split}."):
                paths.upload(str(Path(folder) / name), part.stream(name))
        yield Path(folder)


def _cut(file: TokenFile, text_bytes: Any, names: list[str], first: int, end: int) -> Shard:
    span, labels = slice(file.offsets[first], file.offsets[end]), file.labels[first:end].astype(np.int64)
    tokens, learned = np.array(file.tokens[span]), None if file.learned is None else np.array(file.learned[span])
    return Shard(tokens, file.lengths[first:end], text_bytes[first:end], labels, names, learned)


def _one(held: Sequence[Shard]) -> Shard:
    """Neighbouring shards as one, with the names of its labels alone, sorted."""
    used = [np.unique(shard.labels) for shard in held]
    names = sorted({shard.names[label] for shard, own in zip(held, used, strict=True) for label in own})
    places = {name: place for place, name in enumerate(names)}
    labels = [np.array([places.get(name, 0) for name in shard.names])[shard.labels] for shard in held]
    tokens, lengths, text_bytes = (
        np.concatenate([getattr(shard, name) for shard in held]) for name in ("tokens", "lengths", "text_bytes")
    )
    learned = [shard.learned for shard in held if shard.learned is not None]
    all_learned = np.concatenate(learned) if learned else None
    return Shard(tokens, lengths, text_bytes, np.concatenate(labels), names, all_learned)
