"""Shares of a corpus that tasks read and tokenise side by side, and the same corpus as of one process put together.

What is to be read, all files of all splits in their order, is cut between files into as many shares as there are
tasks; each task writes token files of its own share, with the bytes of each document's text. Put together they are cut
into the shards of one process again, because labels get their numbers in the order in which shards bring them. So no
byte depends on the number of tasks.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import Artifact, paths
from checkpoints.redact import redact
from modularforge.config import Config
from modularforge.data import shards
from modularforge.data.cleaning import cleaned_names, read_cleaned_files
from modularforge.data.corpus import SPLITS, Document, Split, document_limit, no_documents, read_documents
from modularforge.data.files import find_files
from modularforge.data.inputs import Match, file_states
from modularforge.data.prepare import Encoder, write_corpus, write_split
from modularforge.data.shards import Shard
from modularforge.data.token_files import TokenFile, open_token_file
from modularforge.errors import DataError

FILES_NAME, PART_NAME = "files.json", "part.json"
UNKNOWN_BYTES = 1 << 30  # of a data set of the Hub
# Documents of the training files that are held out are found by reading all, and few of them are tokenised.
READ_AGAIN = 0.1


@dataclass(frozen=True)
class Piece:
    """One file of a split of the source with this number; None is all of them, where they are not read one by one."""

    split: Split
    source: int
    file: str | None
    weight: float


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
    return [piece for split, number in numbered for piece in _pieces_of(config, listing, cleaned, split, number)]


def share_of(pieces: Sequence[Piece], index: int, count: int) -> list[Piece]:
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
        files = [piece.file for piece in own if piece.file is not None]
        if cleaned is not None:
            yield from read_cleaned_files(map(cleaned.local_file, files))
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
