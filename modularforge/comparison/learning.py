"""Whether a curve has settled, and whether a job learns its data by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from modularforge.observe.metrics import Curve

SETTLED_SHARE = 0.01
RISE_SHARE = 0.01
FEWEST_POINTS = 5


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
    if len(curve) < FEWEST_POINTS or not last.any() or not before.any():
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
