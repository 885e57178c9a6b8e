"""Token ids that stand in for one array where they lie in several files, or are spans of what does.

Whoever reads them asks for slices, or for many rows at once, and gets arrays; nothing else is held in memory. What lies
on an object store and is larger than the cache is in ranged_tokens.py.
"""

# B rows  T tokens  P parts

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Range = tuple[int, int]


class StreamedTokens:
    """`size` ids of this type; `read` alone says where they come from."""

    def __init__(self, dtype: np.dtype[Any], size: int) -> None:
        self.dtype, self.size = dtype, size

    def read(self, ranges: Sequence[Range]) -> npt.NDArray[Any]:
        """The ids [start, end) of each range, one after another."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice) -> npt.NDArray[Any]:
        start, end, step = wanted.indices(self.size)
        return self.read([(start, max(start, end))])[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All of it, in memory."""
        return self[:].astype(dtype or self.dtype)

    def rows(self, starts_B: Indices, length: int) -> npt.NDArray[Any]:
        """The ids [start, start + length) of each start, [B, length]."""
        return self.read([(int(start), int(start) + length) for start in starts_B]).reshape(len(starts_B), length)


def let_go(tokens: Any) -> None:
    """Unmap the pages of a token file that were read: what is gone through once shall not count as memory of its own.

    They stay in the system's cache as long as it likes, and whoever reads them again finds them there.
    """
    if isinstance(tokens, SpannedTokens):
        let_go(tokens.whole)
    elif isinstance(tokens, JoinedTokens):
        with tokens.lock:
            parts = list(tokens.opened.values())
        for part in parts:
            let_go(part)
    while isinstance(tokens, np.ndarray):
        tokens = tokens.base
    if isinstance(tokens, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        tokens.madvise(mmap.MADV_DONTNEED)


class Windows:
    """Windows [W, T] of such ids, from `first` on, as an array gives rows."""

    def __init__(self, tokens: StreamedTokens, context_length: int, first: int) -> None:
        self.tokens, self.context_length, self.first = tokens, context_length, first

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context_length

    def __getitem__(self, chosen: Any) -> npt.NDArray[Any]:
        starts_B = np.atleast_1d(np.asarray(chosen, np.int64)) * self.context_length + self.first
        rows_BT = self.tokens.rows(starts_B, self.context_length)
        return rows_BT if np.ndim(chosen) else rows_BT[0]


class JoinedTokens(StreamedTokens):
    """Parts of so many ids one after another; each is opened when it is first read.

    With `most_open`, only so many of the newest are kept: an opened part takes its place on a disk as long as it is.
    """

    def __init__(
        self,
        open_part: Callable[[int], npt.NDArray[Any]],
        counts_P: Sequence[int],
        dtype: np.dtype[Any],
        most_open: int | None = None,
    ) -> None:
        self.ends_P = np.cumsum(counts_P, dtype=np.int64)
        super().__init__(dtype, int(self.ends_P[-1]) if len(self.ends_P) else 0)
        self.open_part, self.most_open = open_part, most_open
        self.opened: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> npt.NDArray[Any]:
        """The ids of all ranges; one that lies in one part is a view of it."""
        found = [self._part(part)[start:end] for part, start, end in across(self.ends_P, ranges)]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.empty(0, self.dtype)

    def _part(self, part: int) -> npt.NDArray[Any]:
        with self.lock:
            if part not in self.opened:
                self.opened[part] = self.open_part(part)
                if self.most_open is not None and len(self.opened) > self.most_open:
                    self.opened.popitem(last=False)
            self.opened.move_to_end(part)
            return self.opened[part]


class SpannedTokens(StreamedTokens):
    """Spans [P, 2] of other tokens, from the first to before the last of each, one after another."""

    def __init__(self, whole: Any, spans_P2: Indices) -> None:
        self.whole, self.starts_P = whole, spans_P2[:, 0]
        self.ends_P = np.cumsum(spans_P2[:, 1] - spans_P2[:, 0], dtype=np.int64)
        super().__init__(whole.dtype, int(self.ends_P[-1]) if len(self.ends_P) else 0)

    def read(self, ranges: Sequence[Range]) -> npt.NDArray[Any]:
        """The ids of all ranges, which the other tokens are asked for at once."""
        found: npt.NDArray[Any] = self.whole.read(
            [(int(self.starts_P[part]) + start, int(self.starts_P[part]) + end)
             for part, start, end in across(self.ends_P, ranges)]
        )  # fmt: skip
        return found

    def places(self, starts_N: Indices) -> Indices:
        """Where in the other tokens these stand."""
        part_N = np.searchsorted(self.ends_P, starts_N, side="right")
        before_N = np.concatenate([np.zeros(1, np.int64), self.ends_P])[part_N]
        found: Indices = self.starts_P[part_N] + starts_N - before_N
        return found


def across(ends_P: Indices, ranges: Iterable[Range]) -> Iterator[tuple[int, int, int]]:
    """Ranges of parts that end there, as (part, start, end) within each part; of an empty range nothing, or an empty
    one of the first part, so that there is always something."""
    empty = True
    for first, end in ranges:
        part = int(np.searchsorted(ends_P, first, side="right"))
        while first < end:
            start = int(ends_P[part - 1]) if part else 0
            stop = min(end, int(ends_P[part]))
            if stop > first:
                yield part, first - start, stop - start
                empty = False
            first, part = stop, part + 1
    if empty and len(ends_P):
        yield 0, 0, 0


def merged_spans(starts_N: Indices, lengths_N: Indices) -> Indices:
    """Documents, where each starts and how long it is, as spans [P, 2]: neighbours are one."""
    ends_N = starts_N + lengths_N
    is_first = np.append(True, starts_N[1:] != ends_N[:-1])[: len(starts_N)]
    is_last = np.append(is_first[1:], True)[: len(starts_N)]
    return np.stack([starts_N[is_first], ends_N[is_last]], axis=1).astype(np.int64).reshape(-1, 2)
