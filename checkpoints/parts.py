"""Bytes in parts of one size, each in a buffer that is filled again once its part was sent.

Fresh memory of a part costs 4,096 page faults, which for a whole file was a quarter of an upload's processor time.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator


class Parts:
    """Iterates over chunks as parts, the last one shorter; chunks need to stay only until the next is asked for.

    There are as many buffers as parts that were not given back, and one more.
    """

    def __init__(self, chunks: Iterable[bytes | memoryview], part_bytes: int) -> None:
        self._chunks = chunks
        self._part_bytes = part_bytes
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[bytearray]:
        part, filled = bytearray(), 0
        for chunk in self._chunks:
            rest = memoryview(chunk)
            while len(rest):
                if not filled:
                    part = self._buffer()
                taken = min(len(rest), self._part_bytes - filled)
                with memoryview(part) as buffer:  # a bytearray would copy what it is given once more
                    buffer[filled : filled + taken] = rest[:taken]
                filled, rest = filled + taken, rest[taken:]
                if filled == self._part_bytes:
                    yield part
                    filled = 0
        if filled:
            del part[filled:]
            yield part

    def give_back(self, part: bytearray) -> None:
        """Let a part's memory be filled again; from any thread."""
        if len(part) == self._part_bytes:
            self._free.put(part)

    def _buffer(self) -> bytearray:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return bytearray(self._part_bytes)
