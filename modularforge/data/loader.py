"""Batches of token windows from a stream of ids: shuffled for training, in order for evaluation.

Training yields (inputs, targets, position); starting again at a position continues exactly, on any number of ranks:
positions count windows over all ranks, and n ranks together take the batch that one would.
"""

# B batch  T context length  W windows

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modularforge.data.mixing import MixedOrder, Mixture
from modularforge.data.token_files import ExampleTokens, Stream, TokenFile, Tokens
from modularforge.data.token_streams import StreamedTokens, Windows
from modularforge.data.tokenizer import PAD
from modularforge.errors import DataError, TrainingError

# torch's cross_entropy skips these targets.
IGNORED_TARGET = -100
MOST_LISTED = 1 << 26
"""Windows of which an epoch's order is listed: half a gigabyte, two of them in each process."""
ROUNDS = 6


def batches(
    tokens: Tokens,
    context_length: int,
    batch_size: int,
    seed: int,
    start_position: int = 0,
    rank: int = 0,
    world: int = 1,
    name: str = "the training data",
    mixture: Mixture | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless inputs [B/world, T], targets [B/world, T] and the position after the batch (called on every rank).

    Each epoch visits every window once, in an order of its own drawn from seed and epoch, or as a mixture has it; a
    batch may span two epochs.
    Raises TrainingError when the tokens do not fill one batch; `name` stands for them in the message.
    """
    inputs_WT, targets_WT = _windows(tokens, context_length)
    _require_batch(len(inputs_WT), len(tokens), context_length, batch_size, world, name)
    share = batch_size // world
    order = order_of(len(inputs_WT), context_length, seed, mixture)
    position = start_position
    while True:
        first = position + rank * share
        chosen_B = order.windows(first, first + share)
        position += batch_size
        yield _tensor(inputs_WT[chosen_B]), _tensor(targets_WT[chosen_B]), position


def mixed_batches(
    streams: Sequence[Tokens],
    seeds: Sequence[int],
    windows_each: int,
    context_length: int,
    batch_size: int,
    seed: int,
    start_position: int = 0,
    rank: int = 0,
    world: int = 1,
    first_window: int = 0,
    mixtures: Sequence[Mixture | None] = (),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Inputs [B/world, T], targets and position like `batches`, of the very windows that jobs on the streams take.

    Job k takes `windows_each` windows of `batches(streams[k], …, seeds[k])`, from the position `first_window` on, of
    `mixtures[k]` where they are given; here all of them come once, in one order drawn from `seed`, and then the
    iterator ends.
    """
    pairs = [_windows(tokens, context_length) for tokens in streams]
    counts = [len(inputs_WT) for inputs_WT, _ in pairs]
    mixtures = mixtures or [None] * len(streams)
    orders = [order_of(counts[k], context_length, seeds[k], mixtures[k]) for k in range(len(counts))]
    for k, count in enumerate(counts):
        _require_batch(count, len(streams[k]), context_length, batch_size, world, f"partition {k}")
    mixed_S2 = mixed_windows(orders, windows_each, batch_size, seed, first_window)
    share = batch_size // world
    for position in range(start_position, len(mixed_S2), batch_size):
        mine = mixed_S2[position + rank * share : position + (rank + 1) * share]
        inputs_BT, targets_BT = (np.stack([pairs[k][part][w] for k, w in mine]) for part in (0, 1))
        yield _tensor(inputs_BT), _tensor(targets_BT), position + batch_size


def mixed_windows(
    orders: Sequence[Order | MixedOrder], windows_each: int, batch_size: int, seed: int, first_window: int
) -> npt.NDArray[np.int64]:
    """Stream and window [S, 2] of all that jobs with these orders take, in one order drawn from `seed`."""
    taken_S2: list[npt.NDArray[np.int64]] = []
    end = first_window + windows_each
    for k, order in enumerate(orders):
        chosen = [order.windows(first, min(first + batch_size, end)) for first in range(first_window, end, batch_size)]
        windows = np.concatenate(chosen)
        taken_S2.append(np.stack([np.full_like(windows, k), windows], axis=1))
    mixed_S2: npt.NDArray[np.int64] = np.random.default_rng([seed]).permutation(np.concatenate(taken_S2))
    return mixed_S2


def evaluation_batches(
    tokens: Tokens, context_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets [B, T] in order, each token predicted once, at most `max_tokens` of them.

    The last window is padded, with targets of -100; the last batch may have fewer rows. DataError without tokens.
    """
    count = min(len(tokens) - 1, max_tokens or len(tokens))
    if count < 1:
        raise DataError(f"evaluation data must have at least 2 tokens, but has {len(tokens)}; check the split's files")
    for start in range(0, count, batch_size * context_length):
        end = min(start + batch_size * context_length, count)
        piece = np.asarray(tokens[start : end + 1], dtype=np.int64)
        yield _rows(piece[:-1], context_length, PAD), _rows(piece[1:], context_length, IGNORED_TARGET)


def label_tokens(file: TokenFile, label: int, max_tokens: int | None = None) -> Stream:
    """The documents of one label one after another, so that no window mixes domains; cut after `max_tokens` + 1 ids.

    Examples are whole: the last one is not cut.
    """
    if file.has_examples:
        stream = file.stream(np.flatnonzero(file.labels == label))
        assert isinstance(stream, ExampleTokens)
        return stream if max_tokens is None or not len(stream) else stream.first(max_tokens)
    documents: list[Tokens] = []
    missing = file.tokens.size if max_tokens is None else max_tokens + 1
    for index in np.flatnonzero(file.labels == label):
        documents.append(file.document(int(index))[:missing])
        missing -= len(documents[-1])
        if missing <= 0:
            break
    return np.concatenate(documents) if documents else np.empty(0, file.tokens.dtype)


def order_of(num_windows: int, context_length: int, seed: int, mixture: Mixture | None = None) -> Order | MixedOrder:
    """Which window of a stream stands at a position."""
    if mixture is None:
        return Order(num_windows, seed)
    return MixedOrder(mixture.of_places(np.arange(num_windows) * context_length), seed, mixture)


class Order:
    """Which window stands at a position: a permutation per epoch, of which the newest two are kept.

    Of more than `MOST_LISTED` windows it is computed for each position, so that nothing is kept. Blocks of neighbours
    would be read faster; but files lie source by source, and steps would be of one source alone.
    """

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows = num_windows
        self.seed = seed
        self.permutations: dict[int, npt.NDArray[np.int64]] = {}

    def windows(self, first: int, end: int) -> npt.NDArray[np.int64]:
        """Windows at the positions [first, end), which may span two epochs."""
        if self.num_windows > MOST_LISTED:
            return self._computed(np.arange(first, end))
        epoch, start = divmod(first, self.num_windows)
        head_B = self._permutation(epoch)[start : start + end - first]
        missing = end - first - len(head_B)
        return np.concatenate([head_B, self._permutation(epoch + 1)[:missing]]) if missing else head_B

    def _computed(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs, places = np.divmod(positions, self.num_windows)
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            keys = np.random.default_rng([self.seed, epoch]).integers(0, 1 << 64, ROUNDS, np.uint64, endpoint=False)
            found[epochs == epoch] = permuted(places[epochs == epoch], self.num_windows, keys)
        return found

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self.permutations:
            self.permutations = {old: order for old, order in self.permutations.items() if old == epoch - 1}
            self.permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_windows)
        return self.permutations[epoch]


def permuted(places: npt.NDArray[np.int64], count: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of `count` numbers takes these, by a Feistel network (Luby and Rackoff, 1988).

    It permutes a power of four; what leaves the range is taken on until it is back (Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return found.astype(np.int64)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits (splitmix64's, Steele et al., 2014); products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def _windows(tokens: Tokens, context_length: int) -> tuple[Any, Any]:
    """Views [W, T] of the ids and of the ids one later; the tail that fills no window is left out."""
    streamed: Any = tokens  # which may stand in for an array
    if isinstance(streamed, StreamedTokens):
        return Windows(streamed, context_length, 0), Windows(streamed, context_length, 1)
    flat = np.asarray(tokens)  # a plain view: indexing np.memmap itself costs microseconds a row
    length = max(len(flat) - 1, 0) // context_length * context_length
    return flat[:length].reshape(-1, context_length), flat[1 : length + 1].reshape(-1, context_length)


def _tensor(ids_BT: Tokens) -> torch.Tensor:
    return torch.from_numpy(ids_BT.astype(np.int64))


def _rows(ids: npt.NDArray[np.int64], context_length: int, filler: int) -> torch.Tensor:
    padding = -len(ids) % context_length
    rows_BT: Any = np.pad(ids, (0, padding), constant_values=filler).reshape(-1, context_length)
    return torch.from_numpy(rows_BT)


def _require_batch(windows: int, tokens: int, context_length: int, batch_size: int, world: int, name: str) -> None:
    needed = batch_size * context_length + 1
    if windows < batch_size:
        raise TrainingError(
            f"{name} must fill one batch of {batch_size} x {context_length} tokens ({needed}), but has {tokens}; "
            "lower batch_size or model.context_length, add text, or make fewer partitions"
        )
    require_shares(batch_size, world)


def require_shares(batch_size: int, world: int) -> None:
    """Raise TrainingError where ranks cannot share a batch."""
    if batch_size % world:
        raise TrainingError(
            f"batch_size must be a multiple of the number of processes ({world}), but is {batch_size}; "
            "change one of them"
        )
