"""Where two curves part: the first common step at which their ratio leaves a band, up or down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modularforge.observe.metrics import Curve, Floats


@dataclass(frozen=True)
class Parting:
    """The first step outside 1/band … band with the ratio there, and from which step on it stays outside."""

    band: float
    step: int
    ratio: float
    for_good_from: int | None


def on_common_steps(first: Curve, second: Curve) -> tuple[Floats, Floats, Floats]:
    """Steps that both curves have with finite values, and the values of each."""
    first, second = first.finite(), second.finite()
    steps, left, right = np.intersect1d(first.steps, second.steps, assume_unique=True, return_indices=True)
    return steps, first.values[left], second.values[right]


def ratios(first: Floats, second: Floats) -> Floats:
    """first / second; where exactly one is 0 or the signs differ, infinity."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(first == second, 1.0, first / second)
    found: Floats = np.where(ratio > 0, ratio, np.inf)
    return found


def find_parting(steps: Floats, first: Floats, second: Floats, band: float) -> Parting | None:
    """Where the ratio first / second first leaves 1/band … band; None when it never does."""
    ratio = ratios(first, second)
    outside = (ratio > band) | (ratio < 1 / band)
    if not outside.any():
        return None
    index = int(np.argmax(outside))
    inside = np.flatnonzero(~outside)
    back = int(inside[-1]) + 1 if len(inside) else 0
    return Parting(band, int(steps[index]), float(ratio[index]), int(steps[back]) if back < len(steps) else None)


def first_difference(steps: Floats, first: Floats, second: Floats) -> int | None:
    """The first step at which the values are not equal to the last bit."""
    unequal = np.flatnonzero(first != second)
    return int(steps[unequal[0]]) if len(unequal) else None
