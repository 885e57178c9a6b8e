"""Token ids on an object store, read by ranges: blocks of files come as they are wanted, and the newest are kept.

For token files that are larger than what this machine shall keep. A block is one GET; nothing is listed or looked at
before it. What is kept lies in one temporary file of a size that is known before, which is gone with the process.
Blocks are not compared with the file's hash, which is of the whole; a file of an artifact never changes in its place.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints import paths
from checkpoints.options import cache_folder
from checkpoints.parallel import in_order
from modularforge.data.token_streams import Range, StreamedTokens, across
from modularforge.errors import DataError

# A store takes about as long for these as for one window; the other windows in it are used if they are still kept.
BLOCK_BYTES = 1 << 16
READS_AT_ONCE = 16
Block = tuple[int, int]
"""A file's place, and the block's in it."""


class RangedTokens(StreamedTokens):
    """Files of so many ids each, by URL, one after another; at most `most_bytes` of them are kept here.

    Raises DataError where a range is not what was asked for.
    """

    def __init__(self, files: Sequence[tuple[str, int]], dtype: np.dtype[Any], most_bytes: int) -> None:
        self.files, self.ends_P = files, np.cumsum([count for _, count in files], dtype=np.int64)
        super().__init__(dtype, int(self.ends_P[-1]))
        self.slots = max(2, most_bytes // BLOCK_BYTES)
        self.kept: OrderedDict[Block, int] = OrderedDict()  # slot of each block, the one used last at the end
        cache_folder().mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 as long as the tokens
        self.requests = 0

    def read(self, ranges: Sequence[Range]) -> npt.NDArray[Any]:
        """The ids of all ranges; blocks that are not kept come side by side."""
        width = self.dtype.itemsize
        pieces = [
            (file, range(start * width, end * width)) for file, start, end in across(self.ends_P, ranges) if end > start
        ]
        blocks = [
            [(file, block) for block in range(span.start // BLOCK_BYTES, -(-span.stop // BLOCK_BYTES))]
            for file, span in pieces
        ]
        found = self._blocks(list(dict.fromkeys(block for own in blocks for block in own)))
        content = [
            b"".join(found[block] for block in own)[span.start % BLOCK_BYTES :][: len(span)]
            for (_, span), own in zip(pieces, blocks, strict=True)
        ]
        return np.frombuffer(b"".join(content), self.dtype)

    def _blocks(self, wanted: list[Block]) -> dict[Block, bytes]:
        """These blocks, those that are not kept side by side from the store."""
        found = {block: self._kept(block) for block in wanted if block in self.kept}
        missing = [block for block in wanted if block not in found]
        for block, content in zip(missing, in_order(self._fetched, missing, READS_AT_ONCE), strict=True):
            found[block] = content
            self._keep(block, content)
        return found

    def _size(self, file: int) -> int:
        return self.files[file][1] * self.dtype.itemsize

    def _fetched(self, place: Block) -> bytes:
        file, block = place
        url, start = self.files[file][0], block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self._size(file))
        content = paths.read_bytes(url, start, end)
        if len(content) != end - start:
            raise DataError(
                f"{url} must have bytes {start} to {end}, but gave {len(content)} of them; make the artifact again"
            )
        return content

    def _kept(self, place: Block) -> bytes:
        file, block = place
        self.kept.move_to_end(place)
        self.file.seek(self.kept[place] * BLOCK_BYTES)
        return self.file.read(min(BLOCK_BYTES, self._size(file) - block * BLOCK_BYTES))

    def _keep(self, place: Block, content: bytes) -> None:
        self.requests += 1
        slot = len(self.kept) if len(self.kept) < self.slots else self.kept.popitem(last=False)[1]
        self.file.seek(slot * BLOCK_BYTES)
        self.file.write(content)
        self.kept[place] = slot
