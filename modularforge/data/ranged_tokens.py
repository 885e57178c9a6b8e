"""Token ids on an object store, read by ranges: blocks of the file come as they are wanted, and the newest are kept.

For a token file that is larger than what this machine shall keep. A block is one GET; nothing is listed or looked at
before it. What is kept lies in one temporary file of a size that is known before, which is gone with the process.
Blocks are not compared with the file's hash, which is of the whole; a file of an artifact never changes in its place.
"""

# B windows  T tokens

from __future__ import annotations

import tempfile
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints import paths
from checkpoints.options import cache_folder
from checkpoints.parallel import in_order
from modularforge.errors import DataError

# A store takes about as long for these as for one window; the other windows in it are used if they are still kept.
BLOCK_BYTES = 1 << 16
READS_AT_ONCE = 16


class RangedTokens:
    """`count` ids at a URL as a sequence of which slices are arrays; at most `most_bytes` of it are kept here.

    Raises DataError where a range is not what was asked for.
    """

    def __init__(self, url: str, dtype: np.dtype[Any], count: int, most_bytes: int) -> None:
        self.url, self.dtype, self.size = url, dtype, count
        self.slots = max(2, most_bytes // BLOCK_BYTES)
        self.kept: OrderedDict[int, int] = OrderedDict()  # slot of each block, the one used last at the end
        cache_folder().mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 as long as the tokens
        self.requests = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, wanted: slice) -> npt.NDArray[Any]:
        start, end, step = wanted.indices(self.size)
        found: npt.NDArray[Any] = self.rows(np.array([start]), max(0, end - start))[0][::step]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All of it, in memory."""
        return self[:].astype(dtype or self.dtype)

    def rows(self, starts_B: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """The ids [start, start + length) of each start, [B, length]."""
        width = self.dtype.itemsize
        rows = [range(int(start) * width, (int(start) + length) * width) for start in starts_B]
        blocks = {row: range(row.start // BLOCK_BYTES, -(-row.stop // BLOCK_BYTES)) for row in rows if len(row)}
        wanted = dict.fromkeys(block for own in blocks.values() for block in own)
        found = self._blocks(list(wanted))
        content = [
            b"".join(found[block] for block in blocks[row])[row.start % BLOCK_BYTES :][: len(row)] if len(row) else b""
            for row in rows
        ]
        return np.frombuffer(b"".join(content), self.dtype).reshape(len(rows), length)

    def _blocks(self, wanted: list[int]) -> dict[int, bytes]:
        """These blocks, those that are not kept side by side from the store."""
        found = {block: self._kept(block) for block in wanted if block in self.kept}
        missing = [block for block in wanted if block not in found]
        for block, content in zip(missing, in_order(self._fetched, missing, READS_AT_ONCE), strict=True):
            found[block] = content
            self._keep(block, content)
        return found

    def _fetched(self, block: int) -> bytes:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.size * self.dtype.itemsize)
        content = paths.read_bytes(self.url, start, end)
        if len(content) != end - start:
            raise DataError(
                f"{self.url} must have bytes {start} to {end}, but gave {len(content)} of them; make the artifact again"
            )
        return content

    def _kept(self, block: int) -> bytes:
        self.kept.move_to_end(block)
        self.file.seek(self.kept[block] * BLOCK_BYTES)
        return self.file.read(min(BLOCK_BYTES, self.size * self.dtype.itemsize - block * BLOCK_BYTES))

    def _keep(self, block: int, content: bytes) -> None:
        self.requests += 1
        slot = len(self.kept) if len(self.kept) < self.slots else self.kept.popitem(last=False)[1]
        self.file.seek(slot * BLOCK_BYTES)
        self.file.write(content)
        self.kept[block] = slot


class RangedWindows:
    """Windows [W, T] of such ids, from `first` on, as an array gives rows."""

    def __init__(self, tokens: RangedTokens, context_length: int, first: int) -> None:
        self.tokens, self.context_length, self.first = tokens, context_length, first

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context_length

    def __getitem__(self, chosen: Any) -> npt.NDArray[Any]:
        starts_B = np.atleast_1d(np.asarray(chosen, np.int64)) * self.context_length + self.first
        rows_BT = self.tokens.rows(starts_B, self.context_length)
        return rows_BT if np.ndim(chosen) else rows_BT[0]
