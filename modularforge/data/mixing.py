"""Which window of a mixture stands at a position: sources are drawn by weights, each in an order of its own.

A mixture's epoch has as many windows as the text, and of each source as many of them as its share says, in an order
drawn from seed and epoch. A source goes through its own windows one epoch after another, each in an order of its own,
so that none comes again before all have come. A source that has reached its limit leaves its share to the others. All
of it follows from the position alone, which restarts the stream.
"""

# W windows  G sources (labels)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from modularforge.config import Config
from modularforge.data.token_files import TokenFile
from modularforge.errors import DataError, TrainingError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
OWN_ORDER = 1 << 32  # what tells the orders of sources from those of the mixture


@dataclass(frozen=True)
class Mixture:
    """How text of several sources is drawn.

    `tokens_G` are the tokens of each, `weights_G` and `limits_G` (epochs, infinite where there is none) as the settings
    say; `ends` are where runs of documents of one source end in the stream, in tokens, and `sources` whose each run is.
    """

    names: tuple[str, ...]
    tokens_G: Indices
    weights_G: Floats
    limits_G: Floats
    ends: Indices
    sources: Indices
    temperature: float | None
    name: str = "the training data"

    @cached_property
    def shares_G(self) -> Floats:
        """Share of each source in what is drawn while none has reached its limit."""
        power = 0.0 if self.temperature is None else 1 / self.temperature
        drawn_G = np.where(self.tokens_G > 0, self.weights_G * np.maximum(self.tokens_G, 1.0) ** power, 0.0)
        if not drawn_G.any():
            raise DataError(
                f"{self.name} must have text of a source that is drawn, but data.mix gives all of its sources "
                f"({', '.join(np.array(self.names)[self.tokens_G > 0])}) the weight 0; raise one"
            )
        found_G: Floats = drawn_G / drawn_G.sum()
        return found_G

    def of_places(self, starts_W: Indices) -> Indices:
        """The source of each window, that of the token at its start, [W]."""
        found_W: Indices = self.sources[np.searchsorted(self.ends, starts_W, side="right")]
        return found_W


def mixture_of(config: Config, file: TokenFile, names: Sequence[str], name: str) -> Mixture | None:
    """The mixture of a token file, whose labels have these names; None where all text is drawn alike.

    Raises DataError where the settings name a label that there is not.
    """
    if not config.mixes:
        return None
    given = {item.source: item for item in config.data.mix}
    if unknown := [label for label in given if label not in names]:
        raise DataError(
            f"data.mix must name labels of the data ({', '.join(names):.200}), but names {unknown[0]!r:.60}; name one "
            "of these"
        )
    weights = [given[label].weight if label in given else 1.0 for label in names]
    limits = [(given[label].epochs if label in given else None) or np.inf for label in names]
    tokens_G = np.bincount(file.labels, weights=file.lengths, minlength=len(names)).astype(np.int64)
    is_last = np.flatnonzero(np.append(np.diff(file.labels.astype(np.int64)) != 0, True))
    runs = file.offsets[1:][is_last], file.labels[is_last].astype(np.int64)
    return Mixture(tuple(names), tokens_G, np.array(weights), np.array(limits), *runs, config.data.temperature, name)


class MixedOrder:
    """Which window stands at a position of a mixture; `sources_W` says of which source each is."""

    def __init__(self, sources_W: Indices, seed: int, mixture: Mixture) -> None:
        self.mixture, self.seed = mixture, seed
        self.own = [np.flatnonzero(sources_W == source) for source in range(len(mixture.names))]
        self.sizes_G = np.array([len(windows) for windows in self.own])
        self.length = len(sources_W)
        limits_G = np.where(self.sizes_G > 0, mixture.limits_G, 0.0) * self.sizes_G  # inf times 0 is no number
        self.limits_G = np.floor(np.minimum(limits_G, np.iinfo(np.int64).max / 2)).astype(np.int64)
        self.starts = [(0, np.zeros_like(self.sizes_G))]  # of epochs so far: the position, and what was drawn before
        self.orders: dict[int, Indices] = {}

    def windows(self, first: int, end: int) -> Indices:
        """Windows at the positions [first, end); raises TrainingError where all sources have reached their limits."""
        found, position = [], first
        while position < end:
            epoch = self._epoch_at(position)
            start = self.starts[epoch][0]
            piece = self._order(epoch)[position - start : end - start]
            found.append(piece)
            position += len(piece)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def drawn(self, count: int) -> Indices:
        """How many of the first windows are of each source, [G]."""
        epoch = self._epoch_at(max(count - 1, 0))
        start, before_G = self.starts[epoch]
        drawn_G: Indices = before_G + np.bincount(self._sources(epoch)[: count - start], minlength=len(self.sizes_G))
        return drawn_G

    def facts(self, count: int) -> dict[str, dict[str, float]]:
        """Of each source that has text here: its windows, their share, and how often each was drawn on average."""
        drawn_G = self.drawn(count)
        return {
            name: {
                "windows": int(drawn),
                "share": round(float(drawn) / max(1, count), 4),
                "epochs": round(float(drawn) / int(size), 3),
            }
            for name, drawn, size in zip(self.mixture.names, drawn_G, self.sizes_G, strict=True)
            if size
        }

    def _epoch_at(self, position: int) -> int:
        """The epoch that holds a position; the starts of those before it are remembered."""
        while self.starts[-1][0] <= position:
            start, before_G = self.starts[-1]
            counts_G = self._counts(before_G)
            if not counts_G.any():
                raise TrainingError(
                    f"{self.mixture.name} must have {position + 1} sequences, but data.mix lets only {start} be drawn "
                    "of it; raise epochs, add text, or lower the steps"
                )
            self.starts.append((start + int(counts_G.sum()), before_G + counts_G))
        return next(index for index in range(len(self.starts) - 2, -1, -1) if self.starts[index][0] <= position)

    def _counts(self, before_G: Indices) -> Indices:
        """How many windows of each source an epoch has; what one at its limit leaves goes to the others."""
        left_G = np.where(self.sizes_G > 0, self.limits_G - before_G, 0)
        counts_G = np.zeros_like(left_G)
        while (missing := self.length - int(counts_G.sum())) and (
            open_G := (counts_G < left_G) * self._weights_G
        ).any():
            counts_G = np.minimum(counts_G + _apportioned(open_G, missing), left_G)
        return counts_G

    @cached_property
    def _weights_G(self) -> Floats:
        found_G: Floats = np.where(self.sizes_G > 0, self.mixture.shares_G, 0.0)
        return found_G

    def _sources(self, epoch: int) -> Indices:
        """The source of each of an epoch's windows."""
        counts_G = self.starts[epoch + 1][1] - self.starts[epoch][1]
        listed = np.repeat(np.arange(len(counts_G)), counts_G)
        found: Indices = np.random.default_rng([self.seed, epoch]).permutation(listed)
        return found

    def _order(self, epoch: int) -> Indices:
        if epoch not in self.orders:
            self.orders = {old: order for old, order in self.orders.items() if old == epoch - 1}
            sources, before_G = self._sources(epoch), self.starts[epoch][1]
            order = np.empty(len(sources), np.int64)
            for source, before in enumerate(before_G):
                places = np.flatnonzero(sources == source)
                order[places] = self._own_windows(source, int(before), int(before) + len(places))
            self.orders[epoch] = order
        return self.orders[epoch]

    def _own_windows(self, source: int, first: int, end: int) -> Indices:
        """A source's windows from one of its own positions to another."""
        own, size = self.own[source], len(self.own[source])
        epochs = range(first // size, -(-end // size)) if end > first else ()
        orders = [np.random.default_rng([self.seed, OWN_ORDER, source, epoch]).permutation(own) for epoch in epochs]
        skipped = first // size * size if orders else 0
        return np.concatenate([own[:0], *orders])[first - skipped : end - skipped]


def _apportioned(weights_G: Floats, count: int) -> Indices:
    """So many in proportion to the weights, by the largest remainders."""
    exact_G = weights_G / weights_G.sum() * count
    found_G: Indices = np.floor(exact_G).astype(np.int64)
    rest = np.argsort(found_G - exact_G, kind="stable")[: count - int(found_G.sum())]
    found_G[rest] += 1
    return found_G


def order_facts(order: Any, count: int) -> dict[str, Any]:
    """What a job's manifest says of a mixture of which so many windows are drawn; nothing of other orders."""
    return {"mixture": order.facts(count)} if isinstance(order, MixedOrder) else {}
