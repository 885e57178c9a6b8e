"""Examples in rows of a context's length: several in one that do not see each other, or each padded in its own.

Which examples share a row follows from the seed alone, so that rows stand for windows of text: a permutation per epoch
orders them, positions count them over all ranks, and a position restarts the stream. An example that is too long loses
the beginning of its prompt; a response that is too long alone loses its end. Both are counted.

Of documents of text nothing is lost: one that is too long is cut into pieces of a whole row and a rest, which are
packed as documents are (best-fit packing, arXiv 2404.10830, in the order of the seed); a piece does not see the one
before it.
"""

# B batch  T tokens of the longest row  N examples  W rows

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modularforge.data.loader import IGNORED_TARGET, Order, mixed_windows, require_shares
from modularforge.data.mixing import MixedOrder, Mixture
from modularforge.data.token_files import ExampleTokens, Tokens
from modularforge.data.tokenizer import PAD
from modularforge.errors import DataError, TrainingError

PADDING = -1  # in place of the number of an example
WIDTH_MULTIPLE = 8  # rows are as wide as the longest needs, in few different widths
PROMPT_SHARE = 4  # of a context, the part that a prompt keeps before a response that is too long alone
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Examples cut to `context_length` + 1 tokens in rows, put there in the order of a seed, or in their own.

    Of a mixture, documents of one source alone share a row.
    """

    stream: ExampleTokens
    context_length: int
    seed: int | None = None
    packs: bool = True
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def spans_N2(self) -> Indices:
        """Where each example begins and ends; of text, each piece, whose first token is the last one of that before."""
        spans_N2 = np.stack([self.stream.offsets[:-1], self.stream.offsets[1:]], axis=1)
        return _pieces(spans_N2, self.context_length) if self.stream.is_text else spans_N2

    @cached_property
    def lengths_N(self) -> Indices:
        """Predicted places of each example: one less than its tokens."""
        return np.minimum(np.diff(self.spans_N2)[:, 0], self.context_length + 1) - 1

    @cached_property
    def examples(self) -> list[list[int]]:
        """The examples of each row."""
        count = len(self.spans_N2)
        if not self.packs:
            return [[index] for index in range(count)]
        if self.seed is None:
            return _in_order(self.lengths_N.tolist(), self.context_length)
        order_N = np.random.default_rng([self.seed]).permutation(count)
        if self.mixture is not None:
            sources_N = self.mixture.of_places(self.spans_N2[order_N, 0])
            parts = [order_N[sources_N == source].tolist() for source in range(len(self.mixture.names))]
            return [row for part in parts for row in _fitted(part, self.lengths_N.tolist(), self.context_length)]
        return _fitted(order_N.tolist(), self.lengths_N.tolist(), self.context_length)

    def order(self, seed: int) -> Order | MixedOrder:
        """Which row stands at a position."""
        if self.mixture is None:
            return Order(len(self), seed)
        starts_W = np.array([self.spans_N2[row[0], 0] for row in self.examples], np.int64)
        return MixedOrder(self.mixture.of_places(starts_W), seed, self.mixture)

    @cached_property
    def targets_W(self) -> Indices:
        """Learned tokens of each row."""
        if self.stream.is_text:
            return np.array([self.lengths_N[row].sum() for row in self.examples])
        learned_N = np.add.reduceat(np.asarray(self.stream.learned, np.int64), self.stream.offsets[:-1])
        for index in self.long_examples:
            learned_N[index] = self.example(int(index))[1][1:].sum()
        return np.array([learned_N[row].sum() for row in self.examples])

    @cached_property
    def long_examples(self) -> Indices:
        """Those that do not fit as they are; documents of text that are cut."""
        return np.flatnonzero(np.diff(self.stream.offsets) > self.context_length + 1)

    @cached_property
    def cut_responses(self) -> int:
        """Of how many the last response alone does not fit."""
        return sum(not self.example(int(index))[2] for index in self.long_examples)

    @cached_property
    def text_facts(self) -> dict[str, Any]:
        """Of documents of text: how many there are, how many are cut, into how many pieces, and how full rows are."""
        return {
            "count": self.stream.num_examples,
            "cut": len(self.long_examples),
            "pieces": len(self.spans_N2) - int((np.diff(self.stream.offsets) > 1).sum()) + len(self.long_examples),
            "rows": len(self),
            "filled": round(float(self.lengths_N.sum()) / max(1, len(self) * self.context_length), 4),
        }

    def example(self, index: int) -> tuple[Tokens, Tokens, bool]:
        """Ids of an example as far as it fits, what of them is learned, and whether its last response is whole."""
        first, end = self.spans_N2[index].tolist()
        ids, learned = self.stream.tokens[first:end], self.stream.learned[first:end]
        room = self.context_length + 1
        if len(ids) <= room:
            return ids, learned, True
        prompt = int(np.flatnonzero(learned == 0)[-1]) + 1
        if len(ids) - prompt < room:
            kept = np.concatenate([np.arange(1), np.arange(len(ids) - room + 1, len(ids))])  # and what starts a text
        else:
            start = prompt - min(prompt, max(1, room // PROMPT_SHARE))
            kept = np.arange(start, start + room)
        return ids[kept], learned[kept], len(ids) - prompt < room

    def tensors(self, chosen_B: Sequence[int] | Indices, width: int | None = None) -> dict[str, Tensor]:
        """Inputs, targets (-100 where nothing is learned) and numbers of examples in their row, each [B, T].

        They have the width of the longest row, or `width`.
        """
        rows = [self.examples[int(row)] for row in chosen_B]
        longest = max(int(self.lengths_N[row].sum()) for row in rows)
        width = width or min(-(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.context_length)
        inputs_BT = np.full((len(rows), width), PAD, np.int64)
        targets_BT = np.full_like(inputs_BT, IGNORED_TARGET)
        examples_BT = np.full_like(inputs_BT, PADDING)
        for place, row in enumerate(rows):
            start = 0
            for number, index in enumerate(row):
                ids, learned, _ = self.example(index)
                span = slice(start, start + len(ids) - 1)
                inputs_BT[place, span], examples_BT[place, span] = ids[:-1], number
                targets_BT[place, span] = np.where(learned[1:] == 1, ids[1:].astype(np.int64), IGNORED_TARGET)
                start = span.stop
        named = {"inputs": inputs_BT, "targets": targets_BT, "examples": examples_BT}
        return {name: torch.from_numpy(array) for name, array in named.items()}


def example_batches(
    rows: Rows, batch_size: int, seed: int, start_position: int = 0, rank: int = 0, world: int = 1, name: str = "data"
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Endless batches of a rank, with the position behind each (called on every rank).

    Besides the tensors of `Rows`, each row has its share of the batch's learned tokens (`row_targets` [B]), so that a
    loss can be their mean over all pieces and ranks. Raises TrainingError when the rows do not fill one batch.
    """
    require_rows(len(rows), batch_size, world, name)
    order, position = rows.order(seed), start_position
    while True:
        chosen = order.windows(position, position + batch_size)
        position += batch_size
        yield _share([(rows, row) for row in chosen], rank, world), position


def mixed_example_batches(
    parts: Sequence[Rows],
    seeds: Sequence[int],
    rows_each: int,
    batch_size: int,
    seed: int,
    start_position: int = 0,
    rank: int = 0,
    world: int = 1,
    first_row: int = 0,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """The same of the very rows that jobs on the parts take, each once, as `mixed_batches` does for text."""
    for number, part in enumerate(parts):
        require_rows(len(part), batch_size, world, f"partition {number}")
    orders = [part.order(own) for part, own in zip(parts, seeds, strict=True)]
    mixed_S2 = mixed_windows(orders, rows_each, batch_size, seed, first_row)
    for position in range(start_position, len(mixed_S2), batch_size):
        chosen = [(parts[part], row) for part, row in mixed_S2[position : position + batch_size]]
        yield _share(chosen, rank, world), position + batch_size


def require_rows(rows: int, batch_size: int, world: int, name: str) -> None:
    """Raise TrainingError where there are too few rows for a batch, or ranks cannot share one."""
    if rows < batch_size:
        raise TrainingError(
            f"{name} must fill one batch of {batch_size} sequences, but its examples fill {rows}; lower batch_size or "
            "model.context_length, add examples, set training.packing to false, or make fewer partitions"
        )
    require_shares(batch_size, world)


def ordered_batches(rows: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All rows in order, once."""
    if not len(rows):
        raise DataError("evaluation data must have at least one example, but has none; check the split's files")
    for first in range(0, len(rows), batch_size):
        yield rows.tensors(range(first, min(first + batch_size, len(rows))))


def _share(chosen: Sequence[tuple[Rows, int]], rank: int, world: int) -> dict[str, Tensor]:
    """This rank's part of a batch of rows."""
    share, targets = len(chosen) // world, sum(int(rows.targets_W[row]) for rows, row in chosen)
    mine = chosen[rank * share : (rank + 1) * share]
    found = _joined([rows.tensors([row]) for rows, row in mine])
    return {**found, "row_targets": torch.full((len(mine),), targets / len(chosen))}


def _joined(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    width = max(row["inputs"].shape[1] for row in rows)
    fillers = {"inputs": PAD, "targets": IGNORED_TARGET, "examples": PADDING}
    return {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (0, width - row[name].shape[1]), value=filler) for row in rows]
        )
        for name, filler in fillers.items()
    }


def _pieces(spans_N2: Indices, room: int) -> Indices:
    """Spans of at most `room` predicted places each; what predicts nothing is left out."""
    places_N = np.maximum(spans_N2[:, 1] - spans_N2[:, 0] - 1, 0)
    counts_N = -(-places_N // room)
    number_P = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    first_P = np.repeat(spans_N2[:, 0], counts_N) + number_P * room
    return np.stack([first_P, np.minimum(first_P + room + 1, np.repeat(spans_N2[:, 1], counts_N))], axis=1)


def _in_order(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Neighbours together as long as they fit."""
    rows: list[list[int]] = []
    left = 0
    for index, length in enumerate(lengths):
        if length > left:
            rows.append([])
            left = room
        rows[-1].append(index)
        left -= length
    return rows


def _fitted(order: Sequence[int], lengths: Sequence[int], room: int) -> list[list[int]]:
    """Each example, in order, into the row that it fills best."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # what is left of a row, ascending
    for index in order:
        place = bisect_left(open_rows, (lengths[index], 0))
        left, row = open_rows.pop(place) if place < len(open_rows) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(open_rows, (left - lengths[index], row))
    return rows
