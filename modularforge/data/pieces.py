"""What is to be read of a corpus, file by file, cut into the shares of tasks and into shards, by sizes alone.

All files of all splits in their order are pieces, large ones several. Which task reads what, and what lies together in
a shard of tokens or of cleaned documents, follows from their sizes, never from the number of tasks.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from checkpoints import Artifact
from checkpoints.redact import redact
from modularforge.config import Config
from modularforge.data.clean_shards import cleaned_names
from modularforge.data.corpus import SPLITS, Split, document_limit, no_documents
from modularforge.data.files import Span, find_files
from modularforge.data.formats import is_divisible
from modularforge.data.inputs import Match, file_states
from modularforge.data.token_files import shard_name
from modularforge.errors import DataError
from modularforge.log import logger

FILES_NAME = "files.json"
UNKNOWN_BYTES = 1 << 30  # of a data set of the Hub
# Documents of the training files that are held out are found by reading all, and few of them are tokenised.
READ_AGAIN = 0.1
# A corpus of more bytes of files has its tokens in shards of so many bytes each, or more where there would be too many.
SHARDED_ABOVE, SHARD_WEIGHT, MOST_SHARDS = 4 << 30, 256 << 20, 4096
UNIT_WEIGHT = 512 << 20  # of files that are cleaned together
SURVIVAL: tuple[Split, ...] = ("test", "validation", "train")
"""The split whose copy stays, where several have one."""
# A file of more bytes is read in pieces, where its format lets one begin anywhere.
PIECE_BYTES, MOST_PIECES = 64 << 20, 1 << 16


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
class _Held:
    """Neighbouring pieces of a split that belong together."""

    split: Split
    number: int
    pieces: list[Piece]

    @property
    def weight(self) -> float:
        """Bytes to read."""
        return sum(piece.weight for piece in self.pieces)


@dataclass(frozen=True)
class PlannedShard(_Held):
    """The pieces that make one shard of a split."""

    @property
    def name(self) -> str:
        """Of its token file."""
        return shard_name(self.split, self.number)


def plan_shards(pieces: Sequence[Piece]) -> list[PlannedShard]:
    """The shards of a large corpus, from its pieces alone; none of one whose token files are whole."""
    total = sum(piece.weight for piece in pieces)
    if total <= SHARDED_ABOVE:
        return []
    size = max(SHARD_WEIGHT, total / MOST_SHARDS)
    return [
        PlannedShard(split, number, held)
        for split, own in by_attribute(pieces, "split")
        for number, held in enumerate(_filled(own, size))
    ]


@dataclass(frozen=True)
class Unit(_Held):
    """Pieces of one split of a source that are cleaned by one task, into files and shards of their own."""

    source: int

    @property
    def name(self) -> str:
        """The beginning of the names of its shards, which sort in the order in which copies survive."""
        return f"{SURVIVAL.index(self.split)}-{self.split}-{self.source:04d}-{self.number:05d}"


Work = TypeVar("Work", Piece, PlannedShard, Unit)


def plan_units(pieces: Sequence[Piece]) -> list[Unit]:
    """What is cleaned together, from the pieces alone, in the order in which copies survive."""
    size = max(UNIT_WEIGHT, sum(piece.weight for piece in pieces) / MOST_SHARDS)
    return [
        Unit(split, number, held, source)
        for split, all_own in by_attribute(sorted(pieces, key=lambda piece: SURVIVAL.index(piece.split)), "split")
        for source, own in by_attribute(all_own, "source")
        for number, held in enumerate(_filled(own, size))
    ]


def _filled(pieces: Iterable[Piece], size: float) -> Iterator[list[Piece]]:
    """Neighbouring pieces until they have so many bytes; one list at least."""
    held: list[Piece] = []
    weight, is_first = 0.0, True
    for piece in pieces:
        held.append(piece)
        weight += piece.weight  # and not a sum of all at each: there may be a million small files
        if weight >= size:
            yield held
            held, weight, is_first = [], 0.0, False
    if held or is_first:
        yield held


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
    began = "cleaning began" if noted.manifest.kind == "inventory" else "the vocabulary was learned"
    return DataError(
        f"the files of data.sources must stay as they were when {began}, but {name} is gone, new or "
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


def require_documents(config: Config, about: Iterable[Mapping[str, Any]]) -> None:
    """Raise DataError for a split of a source of which all that read it together, `found` by each, had no document."""
    found: dict[str, Counter[str]] = {}
    for place, counts in (item for one in about for item in one["found"].items()):
        found.setdefault(place, Counter()).update(counts)
    for place, counts in found.items():
        split, number = place.split()
        if not counts["documents"]:
            known: Any = split
            raise no_documents(config.data.sources[int(number)], known, config.data, counts["elsewhere"])


def by_attribute(pieces: Iterable[Piece], name: str) -> Iterator[tuple[Any, list[Piece]]]:
    """Neighbours that are alike in this."""
    grouped = itertools.groupby(pieces, lambda piece: getattr(piece, name))
    return ((key, list(own)) for key, own in grouped)
