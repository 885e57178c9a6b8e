"""Cut an array into parts that the site accepts; indices stay global, and one throttle holds for all parts. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class ArrayPart:
    """One array: the global `indices`, of which `offset` is array task 0; it follows part `after` in its lane."""

    indices: tuple[int, ...]
    offset: int
    throttle: int | None
    after: int | None

    @property
    def array(self) -> str:
        """The value of sbatch's --array."""
        limit = "" if self.throttle is None else f"%{self.throttle}"
        return ranges([index - self.offset for index in self.indices]) + limit


def cut(indices: list[int], max_array_size: int, throttle: int | None) -> list[ArrayPart]:
    """Arrays for these global indices; the highest index of an array is `max_array_size` - 1.

    The throttle is divided among lanes of parts; parts of one lane run one after another, so that the sum never
    exceeds it.
    """
    chunks = [list(found) for _, found in groupby(sorted(indices), key=lambda index: index // max_array_size)]
    lanes = len(chunks) if throttle is None else min(len(chunks), throttle)
    parts = []
    for number, chunk in enumerate(chunks):
        lane = number % lanes
        share = None if throttle is None else throttle // lanes + int(lane < throttle % lanes)
        after = number - lanes if number >= lanes else None
        parts.append(ArrayPart(tuple(chunk), chunk[0] // max_array_size * max_array_size, share, after))
    return parts


def ranges(indices: list[int]) -> str:
    """`0-3,7` for [0, 1, 2, 3, 7]."""
    parts = []
    for _, run in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        found = [index for _, index in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}")
    return ",".join(parts)
