"""Keep near duplicates of held-out documents out of training: found in the token files, counted, left out.

Two documents are near duplicates where 70 % of their runs of about 25 bytes are the same, whatever their order: the
likeness at which datatrove's default bands of MinHash find every second pair. Training documents most of whose runs
stand in a held-out one are looked up, and compared with it exactly. Where a corpus is so large that its held-out runs
would not fit into memory, a fixed share of all runs is looked up. Of a document of more than 1 Mi tokens the beginning
stands for the whole.
"""

# T tokens  R runs of tokens

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.parallel import in_order
from modularforge.config import Config
from modularforge.data.clean_steps import cores
from modularforge.data.corpus import HELD_OUT, Split
from modularforge.data.token_files import TokenFile, write_documents, write_spans
from modularforge.data.token_streams import SpannedTokens, let_go
from modularforge.errors import DataError
from modularforge.log import logger

ALIKE = 0.7
RUN_BYTES = 25  # five English words
MOST_RUNS = 1 << 22  # of held-out documents that are looked up; they take 20 bytes each
MOST_TOKENS = 1 << 20  # looked at together, by each of so many threads, which is 50 MB each
MOST_THREADS = 16
KNOWN_SHARE = 0.5  # of a training document's runs, before it is compared
RUN_PLACES, COMPARED = 16, 8  # held-out documents that a run leads to, and that a document is compared with
OUTSIDE = np.uint64((1 << 32) - 1)  # what stands before and behind a response
FACTOR, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Splits = Mapping[Split, dict[str, dict[str, int]]]


def leave_out_copies(
    config: Config,
    folder: Path,
    files: Mapping[Split, TokenFile],
    labels: Sequence[str],
    splits: Splits,
    byte_lengths_V: npt.NDArray[Any],
) -> dict[str, int]:
    """Take near duplicates of documents that were held out here from the token file `train` and its counts in `splits`.

    Those of validation and test files that a source names stay, with a warning. Returns how many there were of both.
    Raises DataError where nothing would be left to train on.
    """
    train, held_out = files["train"], [files[split] for split in HELD_OUT]
    run_tokens = _run_tokens(splits)
    copies: list[int] = []
    chosen: list[int] = []
    is_made = [_is_made(config, file, labels) for file in held_out]
    for copy, number, original in near_copies(train, held_out, run_tokens):
        (copies if is_made[number][original] else chosen).append(copy)
    dropped, left = np.unique(np.array(copies, np.int64)), len({*chosen} - {*copies})
    if len(dropped):
        _rewrite(train, dropped, folder, len(byte_lengths_V))
        _discount(train, dropped, labels, splits["train"], byte_lengths_V)
        logger.warning(
            "%d of %d training documents are near duplicates of one that is held out for validation or test; they are "
            "left out", len(dropped), train.num_documents,
        )  # fmt: skip
    if left:
        logger.warning(
            "%d of %d training documents are near duplicates of one in the validation or test files of the settings: "
            "what is measured there was trained on; name the step near in data.clean, or other files",
            left, train.num_documents,
        )  # fmt: skip
    return {"dropped": len(dropped), "left": left}


def near_copies(train: TokenFile, held_out: Sequence[TokenFile], run_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Every two near duplicates: the index of the training document, and file and index of the held-out one."""
    known = _Known.of(held_out, run_tokens)
    if not len(known.hashes_R):
        return

    def found(block: tuple[int, int]) -> list[tuple[int, int, int]]:
        hashes_R, documents_R = _sampled(train, block, run_tokens, known.limit)
        shares = known.shares(hashes_R, documents_R)
        suspects = np.flatnonzero(shares >= KNOWN_SHARE)
        bounds = zip(*(np.searchsorted(documents_R, suspects + further) for further in (0, 1)), strict=True)
        return [
            (int(block[0] + suspect), *other)
            for suspect, (start, end) in zip(suspects, bounds, strict=True)
            for own in [_distinct(train, int(block[0] + suspect), run_tokens)]
            for other in known.candidates(hashes_R[start:end])
            if _likeness(own, _distinct(held_out[other[0]], other[1], run_tokens)) >= ALIKE
            and _responses_alike(train, int(block[0] + suspect), held_out[other[0]], other[1])
        ]

    for pairs in in_order(found, _blocks(train), min(cores(), MOST_THREADS)):
        let_go(train.tokens)
        yield from pairs


def _likeness(one: Hashes, other: Hashes) -> float:
    """The share of all runs of two documents that both have (Jaccard)."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def _responses_alike(train: TokenFile, index: int, held_out: TokenFile, other: int) -> bool:
    """Whether two examples also have about the same responses, which in many tasks are short beside their prompts."""
    if train.learned is None or held_out.learned is None:
        return True
    one, two = (file.document(k)[file.learned_of(k) == 1] for file, k in ((train, index), (held_out, other)))
    return bool(np.array_equal(one, two)) or _likeness(_neighbours(one), _neighbours(two)) >= ALIKE


def _neighbours(ids: npt.NDArray[Any]) -> Hashes:
    """Every two tokens that follow each other, also the first and the last: 12 and 21 are other answers."""
    ends = np.concatenate([[OUTSIDE], ids.astype(np.uint64), [OUTSIDE]]).astype(np.uint64)
    return np.unique((ends[:-1] << np.uint64(32)) | ends[1:])


@dataclass(frozen=True)
class _Known:
    """The runs of held-out documents, sorted, with file and document of each; `table` says what there is not."""

    hashes_R: Hashes
    places_R2: Indices
    table: npt.NDArray[np.bool_]
    limit: np.uint64
    """Runs whose hash is above it are not looked up."""

    @staticmethod
    def of(files: Sequence[TokenFile], run_tokens: int) -> _Known:
        runs = sum(len(file.tokens) for file in files)
        limit = np.uint64(min(2**64 - 1, (MOST_RUNS << 64) // max(1, runs)))
        found = [
            (hashes_R, number, block[0] + documents_R)
            for number, file in enumerate(files)
            for block in _blocks(file)
            for hashes_R, documents_R in [_sampled(file, block, run_tokens, limit)]
        ]
        hashes_R = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _, _ in found)])
        files_R = np.concatenate([np.empty(0, np.int64), *(np.full(len(own), n) for _, n, own in found)])
        documents_R = np.concatenate([np.empty(0, np.int64), *(documents for _, _, documents in found)])
        order = np.argsort(hashes_R, kind="stable")
        places_R2 = np.stack([files_R, documents_R], axis=1)[order]
        table = np.zeros(1 << max(8, math.ceil(math.log2(len(order) + 1)) + 4), bool)
        known = _Known(hashes_R[order], places_R2, table, limit)
        table[known.places(hashes_R)] = True
        return known

    def places(self, hashes_R: Hashes) -> Hashes:
        """Where the table has these runs."""
        found: Hashes = (hashes_R * MIXER) >> np.uint64(65 - len(self.table).bit_length())
        return found

    def shares(self, hashes_R: Hashes, documents_R: Indices) -> npt.NDArray[np.float64]:
        """The share of each document's runs that may stand in a held-out one."""
        is_known = self.table[self.places(hashes_R)]
        found: npt.NDArray[np.float64] = np.bincount(documents_R, is_known) / np.maximum(np.bincount(documents_R), 1)
        return found

    def candidates(self, hashes_R: Hashes) -> list[tuple[int, int]]:
        """The held-out documents (file, index) that have most of these runs, of each run the first few that have it."""
        distinct = np.unique(hashes_R)
        starts = np.searchsorted(self.hashes_R, distinct)
        counts = np.minimum(np.searchsorted(self.hashes_R, distinct, "right") - starts, RUN_PLACES)
        rows = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        found = Counter(map(tuple, self.places_R2[rows].tolist()))
        return [(file, document) for (file, document), _ in found.most_common(COMPARED)]


def _blocks(file: TokenFile) -> Iterator[tuple[int, int]]:
    """Neighbouring documents, from the first to before the last, of so many tokens together, or one."""
    first = 0
    while first < file.num_documents:
        last = int(np.searchsorted(file.offsets, file.offsets[first] + MOST_TOKENS, "right")) - 1
        yield first, (last := max(first + 1, last))
        first = last


def _sampled(file: TokenFile, block: tuple[int, int], run_tokens: int, limit: np.uint64) -> tuple[Hashes, Indices]:
    """The runs of a block that are looked up, and whose each is, counted from the first document."""
    first, last = block
    start = int(file.offsets[first])
    ends = np.minimum(file.offsets[first + 1 : last + 1] - start, MOST_TOKENS)
    hashes_R, documents_R = _runs(file.tokens[start : start + int(ends[-1])], ends, run_tokens)
    is_sampled = hashes_R <= limit
    return hashes_R[is_sampled], documents_R[is_sampled]


def _distinct(file: TokenFile, index: int, run_tokens: int) -> Hashes:
    tokens_T = file.document(index)[:MOST_TOKENS]
    return np.unique(_runs(tokens_T, np.array([len(tokens_T)]), run_tokens)[0])


def _runs(tokens_T: npt.NDArray[Any], ends: Indices, run_tokens: int) -> tuple[Hashes, Indices]:
    """The hash of every run of tokens within a document, [R], and its document, [R]; `ends` are those of documents."""
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    counts = np.maximum(lengths - run_tokens + 1, 0)
    hashes_T = np.zeros(len(tokens_T), np.uint64)
    for place in range(min(run_tokens, len(tokens_T))):
        hashes_T *= FACTOR
        hashes_T[: len(tokens_T) - place] += tokens_T[place:]
    hashes_T ^= hashes_T >> np.uint64(29)
    hashes_T *= MIXER
    hashes_T ^= hashes_T >> np.uint64(32)
    documents_R = np.repeat(np.arange(len(ends)), counts)
    places_R = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    return hashes_T[places_R], documents_R


def _run_tokens(splits: Splits) -> int:
    """How many tokens of training text are about `RUN_BYTES`."""
    rows = [row for split in splits.values() for row in split.values()]
    tokens, text_bytes = (sum(row[name] for row in rows) for name in ("tokens", "bytes"))
    return max(3, round(RUN_BYTES * tokens / max(1, text_bytes)))


def _is_made(config: Config, file: TokenFile, labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each held-out document was taken from training documents; if it is one of a source that names such files,
    its label says so."""
    chosen = {source.name for source in config.data.sources if getattr(source, file.name)}
    if len(chosen) == len(config.data.sources):
        return np.zeros(file.num_documents, bool)
    return np.array([label not in chosen for label in labels], bool)[file.labels]


def _rewrite(train: TokenFile, dropped: Indices, folder: Path, vocab_size: int) -> None:
    kept = np.setdiff1d(np.arange(train.num_documents), dropped, assume_unique=True)
    if not len(kept):
        raise DataError(
            "the training documents must differ from those held out for validation and test, but all are near "
            "duplicates of one; name validation and test files for the sources, or add text"
        )
    tokens: Any = train.tokens
    if isinstance(tokens, SpannedTokens):
        write_spans(train, kept, folder, "kept")
    else:
        write_documents(train, kept, folder, "kept", vocab_size)
    for path in folder.glob("kept.*"):
        path.replace(folder / f"train.{path.name.partition('.')[2]}")


def _discount(
    train: TokenFile,
    dropped: Indices,
    labels: Sequence[str],
    rows: dict[str, dict[str, int]],
    byte_lengths_V: npt.NDArray[Any],
) -> None:
    for document in dropped:
        row, tokens_T = rows[labels[train.labels[document]]], train.document(document)
        row["documents"] -= 1
        row["tokens"] -= len(tokens_T)
        row["bytes"] -= int(byte_lengths_V[tokens_T].sum())
    for label in [label for label, row in rows.items() if not row["documents"]]:
        del rows[label]
