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
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.format import open_memmap

from checkpoints import Artifact, paths
from checkpoints.redact import redact
from modularforge.config import Config
from modularforge.data import shards
from modularforge.data.cleaning import cleaned_names, read_cleaned_files
from modularforge.data.corpus import SPLITS, Document, Split, document_limit, no_documents, read_documents
from modularforge.data.files import Span, find_files
from modularforge.data.formats import is_divisible
from modularforge.data.inputs import Match, file_states
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
    shard_name,
)
from modularforge.data.token_streams import Indices, JoinedTokens, SpannedTokens
from modularforge.errors import DataError
from modularforge.log import logger

FILES_NAME, PART_NAME = "files.json", "part.json"
UNKNOWN_BYTES = 1 << 30  # of a data set of the Hub
# Documents of the training files that are held out are found by reading all, and few of them are tokenised.
READ_AGAIN = 0.1
# A corpus of more bytes of files has its tokens in shards of so many bytes each, or more where there would be too many.
SHARDED_ABOVE, SHARD_WEIGHT, MOST_SHARDS = 4 << 30, 256 << 20, 4096
# A file of more bytes is read in pieces, where its format lets one begin anywhere.
PIECE_BYTES, MOST_PIECES = 64 << 20, 1 << 16
MOST_OPEN = 4  # shards of an object store that are here at a time while copies are looked for


@dataclass(frozen=True)
class Piece:
    """One file of a split of the source with this number; None is all of them, where they are not read one by one.

    With a span, what begins in these bytes of it.
    """

    split: Split
    source: int
    file: str | None
    weight: float
    span: Span | None = None


@dataclass(frozen=True)
class PlannedShard:
    """The pieces that make one shard of a split."""

    split: Split
    number: int
    pieces: list[Piece]

    @property
    def weight(self) -> float:
        """Bytes to read."""
        return sum(piece.weight for piece in self.pieces)

    @property
    def name(self) -> str:
        """Of its token file."""
        return shard_name(self.split, self.number)


Work = TypeVar("Work", Piece, PlannedShard)


def plan_shards(pieces: Sequence[Piece]) -> list[PlannedShard]:
    """The shards of a large corpus, from its pieces alone; none of one whose token files are whole."""
    total = sum(piece.weight for piece in pieces)
    if total <= SHARDED_ABOVE:
        return []
    size = max(SHARD_WEIGHT, total / MOST_SHARDS)
    planned: list[PlannedShard] = []
    for split, own in _by(pieces, "split"):
        held: list[Piece] = []
        number = 0
        for piece in own:
            held.append(piece)
            if sum(one.weight for one in held) >= size:
                planned.append(PlannedShard(split, number, held))
                held, number = [], number + 1
        if held or not number:
            planned.append(PlannedShard(split, number, held))
    return planned


@dataclass(frozen=True)
class Listing:
    """The files of a corpus as they were when the vocabulary was learned: size and time (or ETag) of each, by URL."""

    states: dict[str, list[Any]]

    @staticmethod
    def write(states: Mapping[str, list[Any]], folder: Path) -> None:
        """Note the files, without the secrets of their URLs."""
        rows = [[redact(url), *state] for url, state in states.items()]
        (folder / FILES_NAME).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def read(noted: Artifact, matches: Iterable[Match]) -> Listing:
        """What was noted, of the files that match now; raises DataError where these are others."""
        rows = noted.read_json(FILES_NAME)
        urls = list(dict.fromkeys(match.url for match in matches))
        if changed := sorted({redact(url) for url in urls} ^ {row[0] for row in rows}):
            raise _changed(changed[0], noted)
        return Listing({url: row[1:] for url, row in zip(urls, rows, strict=True)})

    def require_unchanged(self, files: Iterable[str], noted: Artifact) -> None:
        """Raise DataError when one of these was written since."""
        matches = [Match("", "", url, False) for url in files]
        for url, state in file_states(matches).items():
            if list(state) != list(self.states[url]):
                raise _changed(redact(url), noted)


def _changed(name: str, noted: Artifact) -> DataError:
    return DataError(
        f"the files of data.sources must stay as they were when the vocabulary was learned, but {name} is gone, new or "
        f"written again; put it back, or delete {noted.url.rpartition('/')[0]} to begin again"
    )


def list_pieces(config: Config, listing: Listing, cleaned: Artifact | None) -> list[Piece]:
    """What is to be read for all splits, in the order of one process."""
    numbered = itertools.product(SPLITS, range(len(config.data.sources)))
    found = [piece for split, number in numbered for piece in _pieces_of(config, listing, cleaned, split, number)]
    size = max(PIECE_BYTES, int(sum(piece.weight for piece in found)) // MOST_PIECES)
    return [part for piece in found for part in _spans(config, listing, piece, size)]


def _spans(config: Config, listing: Listing, piece: Piece, size: int) -> Iterator[Piece]:
    """A file in pieces of this size, where each can be read alone."""
    source = config.data.sources[piece.source]
    whole = listing.states.get(piece.file or "", [None])[0]
    if whole is None or whole <= size or not is_divisible(str(piece.file), source) or config.learns_responses:
        yield piece
        return
    for start in range(0, whole, size):
        end = min(start + size, whole)
        yield replace(piece, weight=piece.weight * (end - start) / whole, span=(start, end))


def warn_of_large(pieces: Sequence[Piece], tasks: int) -> None:
    """Say which file one task reads alone, though it is more than the share of a task."""
    share = sum(piece.weight for piece in pieces) / tasks
    large = max((piece for piece in pieces if piece.file), key=lambda piece: piece.weight, default=None)
    if large is not None and large.span is None and large.weight > max(share, PIECE_BYTES) and tasks > 1:
        logger.warning(
            "%s has %.1f GB, and one task reads all of it, more than the %.1f GB of a share: only uncompressed JSON "
            "lines and Parquet are divided, so write it as such, or as several files",
            redact(str(large.file)), large.weight / 1e9, share / 1e9,
        )  # fmt: skip


def share_of(pieces: Sequence[Work], index: int, count: int) -> list[Work]:
    """Those in the share of one of `count` tasks, neighbours, whose weights are about the same for all tasks."""
    weights = np.array([piece.weight for piece in pieces])
    middles = np.cumsum(weights) - weights / 2
    tasks = np.minimum(count - 1, (middles / weights.sum() * count).astype(np.int64))
    return [piece for piece, task in zip(pieces, tasks, strict=True) if task == index]


def _pieces_of(
    config: Config, listing: Listing, cleaned: Artifact | None, split: Split, number: int
) -> Iterator[Piece]:
    if cleaned is not None:
        files = cleaned.manifest.files
        yield from (Piece(split, number, name, files[name].size) for name in cleaned_names(files, number, split))
        return
    source = config.data.sources[number]
    if source.hub is not None:
        yield Piece(split, number, None, UNKNOWN_BYTES)
        return
    share = 1.0 if split == "train" or getattr(source, split) else READ_AGAIN
    found = find_files(getattr(source, split) or source.train)
    pieces = [Piece(split, number, url, share * (listing.states[url][0] or UNKNOWN_BYTES)) for url in found]
    if document_limit(source, split, config.data) is None:
        yield from pieces
    else:  # where it ends, only one that reads from the beginning knows
        yield Piece(split, number, None, sum(piece.weight for piece in pieces))


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
    for split, own in _by(pieces, "split"):
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
    _require_documents(config, about)
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
    for number, own in _by(pieces, "source"):
        split = own[0].split
        files = [(piece.file, piece.span) for piece in own if piece.file is not None]
        if cleaned is not None:
            yield from read_cleaned_files(cleaned.local_file(name) for name, _ in files)
            continue
        source, short = config.data.sources[number], dropped if split == "train" else None
        tally = found.setdefault(f"{split} {number}", Counter())
        writer = encoder.writers.get(source.name)
        yield from read_documents(source, split, config.data, short, writer, files or None, tally)


def _by(pieces: Iterable[Piece], name: str) -> Iterator[tuple[Any, list[Piece]]]:
    grouped = itertools.groupby(pieces, lambda piece: getattr(piece, name))
    return ((key, list(own)) for key, own in grouped)


def put_together(config: Config, encoder: Encoder, parts: Sequence[Artifact], output: Path) -> dict[str, Any]:
    """Write what `prepare_corpus` writes but the tokenizer, from the parts of all tasks; raises DataError."""
    about = [part.read_json(PART_NAME) for part in parts]
    dropped: Counter[str] = Counter()
    for one in about:
        dropped.update(one["dropped"])
    _require_documents(config, about)
    names = [one["names"] for one in about]
    return write_corpus(config, output, encoder, lambda split: _joined(parts, names, split), dropped)


def _require_documents(config: Config, about: Iterable[Mapping[str, Any]]) -> None:
    found: dict[str, Counter[str]] = {}
    for place, counts in (item for one in about for item in one["found"].items()):
        found.setdefault(place, Counter()).update(counts)
    for place, counts in found.items():
        split, number = place.split()
        if not counts["documents"]:
            known: Any = split
            raise no_documents(config.data.sources[int(number)], known, config.data, counts["elsewhere"])


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
