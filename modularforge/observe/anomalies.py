"""What a curve says of a training: what looks wrong in it, whether it has settled, and whether it overfits.

Wrong are non-finite values, spikes, jumps and plateaus, each told with its step.

Differences between neighbours are compared with what is usual around them, by robust z-scores (median and median
absolute deviation), so that the steep beginning of a training is not taken for a fault.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import median_filter

from modularforge.observe.metrics import Curve, Floats

Kind = Literal["non-finite", "spike", "jump", "plateau"]
# Robust standard deviations. Noise passes four of them somewhere in a curve of ten thousand points; six, hardly ever.
THRESHOLD = 6.0
# Of fewer points, the usual spread is so uncertain that one quiet curve in ten would have a spike.
FEWEST_POINTS = 16
# Neighbours that say what is usual: more than twice as many as the longest spike, which is then no median of them.
WINDOW = 11
LONGEST_SPIKE = 5  # points; what stays away for longer is a jump
# Deviations below this share of the usual value are no anomaly, however smooth the curve is.
SMALLEST_SHARE = 2e-3
MAD_TO_SIGMA = 1.4826  # of normal noise: standard deviation over median absolute deviation
PLATEAU_SHARE = 0.1  # of the points, at least; shorter rests are noise
PLATEAU_TOLERANCE = 5e-3  # of the range of the values, for curves without noise
# Of a loss: less is within what another seed would change, and no reason to go on or to stop.
SETTLED_SHARE = 0.01
RISE_SHARE = 0.01
FEWEST_TO_SETTLE = 5  # points, so that the last two fifths have one each


@dataclass(frozen=True)
class Anomaly:
    """Something at steps `first` to `last`; `score` is the robust z of a spike or jump, the points of a plateau."""

    kind: Kind
    first: int
    last: int
    score: float


def find_anomalies(curve: Curve, logarithmic: bool = False, plateaus: bool = True) -> list[Anomaly]:
    """All anomalies by step; `logarithmic` judges ratios instead of differences where all values are positive.

    `plateaus` are looked for only where a curve should not stand still.
    """
    found = [
        Anomaly("non-finite", int(step), int(step), 1.0)
        for step, value in zip(curve.steps, curve.values, strict=True)
        if not np.isfinite(value)
    ]
    finite = curve.finite()
    if len(finite) >= FEWEST_POINTS:
        values = np.log(finite.values) if logarithmic and (finite.values > 0).all() else finite.values
        found += find_spikes(finite.steps, values)
        found += find_plateaus(finite.steps, values) if plateaus else []
    return sorted(found, key=lambda anomaly: (anomaly.first, anomaly.kind))


def robust_scores(values: Floats) -> Floats:
    """How unusual each difference to the value before is, in robust standard deviations; 0 for the first value."""
    differences = np.diff(values)
    unusual = differences - running_median(differences, WINDOW)
    # The median of a window is one of its points, whose zero says nothing of the noise: few points have many of them.
    spread = np.abs(unusual)
    usual = MAD_TO_SIGMA * float(np.median(spread[spread > 0])) if np.median(spread) > 0 else 0.0
    floor = SMALLEST_SHARE * float(np.median(np.abs(values))) / THRESHOLD
    scores: Floats = np.concatenate([[0.0], unusual / max(usual, floor, 1e-300)])
    return scores


def find_spikes(steps: Floats, values: Floats) -> list[Anomaly]:
    """Spikes leave and come back within a few points; jumps stay. A spike is told at the steps where it stands."""
    scores = robust_scores(values)
    found, index = [], 1
    while index < len(values):
        if abs(scores[index]) <= THRESHOLD:
            index += 1
            continue
        ahead = range(index + 1, min(index + 1 + LONGEST_SPIKE, len(values)))
        back = next((i for i in ahead if scores[i] * scores[index] < 0 and abs(scores[i]) > THRESHOLD / 2), None)
        last = index if back is None else back - 1
        kind: Kind = "jump" if back is None else "spike"
        found.append(Anomaly(kind, int(steps[index]), int(steps[last]), float(scores[index])))
        index = (index if back is None else back) + 1
    return found


def find_plateaus(steps: Floats, values: Floats) -> list[Anomaly]:
    """Stretches of a tenth of the curve or more in which the smoothed values stay within noise of each other."""
    smooth = running_median(values, 5)
    reach = float(np.quantile(values, 0.95) - np.quantile(values, 0.05))
    differences = np.diff(values)
    noise = MAD_TO_SIGMA * float(np.median(np.abs(differences - running_median(differences, WINDOW)))) / np.sqrt(2)
    tolerance = max(PLATEAU_TOLERANCE * reach, noise)
    shortest = max(6, int(PLATEAU_SHARE * len(values)))
    if reach == 0:
        return [Anomaly("plateau", int(steps[0]), int(steps[-1]), len(values))]
    return [
        Anomaly("plateau", int(steps[start]), int(steps[end - 1]), end - start)
        for start, end in _flat_stretches(smooth, tolerance)
        if end - start >= shortest
    ]


def running_median(values: Floats, window: int) -> Floats:
    """Centred median; at both ends the window shrinks, at the start on both sides: a steep beginning stays steep."""
    half = window // 2
    if len(values) <= 2 * half:
        return np.full(len(values), float(np.median(values)) if len(values) else 0.0)
    smooth: Floats = median_filter(values, 2 * half + 1)
    smooth[:half] = [np.median(values[: 2 * i + 1]) for i in range(half)]
    smooth[-half:] = [np.median(values[i - half :]) for i in range(len(values) - half, len(values))]
    return smooth


def _flat_stretches(values: Floats, tolerance: float) -> list[tuple[int, int]]:
    """Longest stretches [start, end) whose largest and smallest value differ by no more than the tolerance."""
    highest: deque[int] = deque()
    lowest: deque[int] = deque()
    found: list[tuple[int, int]] = []
    start = 0
    for end, value in enumerate(values):
        while highest and values[highest[-1]] <= value:
            highest.pop()
        while lowest and values[lowest[-1]] >= value:
            lowest.pop()
        highest.append(end)
        lowest.append(end)
        while values[highest[0]] - values[lowest[0]] > tolerance:
            start = min(highest[0], lowest[0]) + 1
            for extremes in (highest, lowest):
                while extremes[0] < start:
                    extremes.popleft()
        found = _with_stretch(found, start, end + 1)
    return found


def _with_stretch(found: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Keep, of stretches that overlap, the longest."""
    if not found or found[-1][1] <= start:
        return [*found, (start, end)]
    if end - start > found[-1][1] - found[-1][0]:
        found[-1] = (start, end)
    return found


@dataclass(frozen=True)
class Convergence:
    """Relative change of the median between the last fifth of the steps and the fifth before it."""

    state: Literal["improving", "settled", "worsening"]
    change: float


@dataclass(frozen=True)
class Overfitting:
    """Validation minus training loss at the first and last validation, and how far validation rose from its best."""

    first_gap: float
    final_gap: float
    best_step: int
    rise: float
    is_overfitting: bool


def convergence(curve: Curve) -> Convergence | None:
    """Judge the end of a curve that should fall; None when it has too few points."""
    span = curve.steps[-1] - curve.steps[0] if len(curve) else 0.0
    last = curve.steps > curve.steps[-1] - span / 5 if len(curve) else np.empty(0, bool)
    before = (curve.steps > curve.steps[-1] - 2 * span / 5) & ~last if len(curve) else last
    if len(curve) < FEWEST_TO_SETTLE or not last.any() or not before.any():
        return None
    old, new = float(np.median(curve.values[before])), float(np.median(curve.values[last]))
    change = (new - old) / abs(old) if old else 0.0
    state: Literal["improving", "settled", "worsening"] = "settled"
    if abs(change) > SETTLED_SHARE:
        state = "improving" if change < 0 else "worsening"
    return Convergence(state, change)


def overfitting(training: Curve | None, validation: Curve | None) -> Overfitting | None:
    """Compare the losses at the steps of validation; a job overfits when validation rises while training falls."""
    if training is None or validation is None:
        return None
    training, validation = training.finite(), validation.finite()
    if not len(training) or not len(validation):
        return None
    trained = np.interp(validation.steps, training.steps, training.values)
    gaps = validation.values - trained
    best = int(np.argmin(validation.values))
    rise = float(validation.values[-1] - validation.values[best])
    overfits = rise > RISE_SHARE * float(validation.values[best]) and trained[-1] < trained[best]
    return Overfitting(float(gaps[0]), float(gaps[-1]), int(validation.steps[best]), rise, bool(overfits))
