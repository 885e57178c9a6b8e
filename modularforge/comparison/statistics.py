"""Statistics of curves with numpy alone: summaries, t-tests, effect sizes, and intervals that respect autocorrelation.

Neighbouring points of one curve are not independent, so the t-tests say too much; the block bootstrap resamples
stretches instead of points (Politis and Romano 1992, the circular variant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from modularforge.comparison.student import quantile, two_sided_p
from modularforge.observe.metrics import Curve, Floats

RESAMPLES = 2000
CONFIDENCE = 0.95
CAVEAT = (
    "The points of one curve are not independent: t-test and Cohen's d take them as if they were and overstate the "
    "evidence. Trust the block bootstrap, and several seeds most."
)


@dataclass(frozen=True)
class Summary:
    """What one curve did; `improvement` is the share of the first value that was gained, positive when better."""

    count: int
    first: float
    final: float
    final_step: int
    best: float
    best_step: int
    mean: float
    standard_deviation: float
    coefficient_of_variation: float
    improvement: float | None


@dataclass(frozen=True)
class TTest:
    """A t-test: statistic, degrees of freedom, two-sided p."""

    statistic: float
    degrees_of_freedom: float
    p: float


def summarise(curve: Curve, better: str) -> Summary:
    """Summary of the finite points of a curve, of which there must be one; the spread has n - 1 in its denominator."""
    steps, values = curve.steps, curve.values
    best = int(np.argmax(values) if better == "higher" else np.argmin(values))
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    gained = float(values[0] - values[-1]) * (-1.0 if better == "higher" else 1.0)
    return Summary(
        count=len(values),
        first=float(values[0]),
        final=float(values[-1]),
        final_step=int(steps[-1]),
        best=float(values[best]),
        best_step=int(steps[best]),
        mean=mean,
        standard_deviation=spread,
        coefficient_of_variation=spread / abs(mean) if mean else math.nan,
        improvement=gained / abs(float(values[0])) if values[0] and better != "neither" else None,
    )


def paired_t_test(first: Floats, second: Floats) -> TTest | None:
    """t-test of the mean difference second - first; None when there is no spread to compare it with."""
    differences = second - first
    count = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return _t_test(float(differences.mean()), error, count - 1) if error else None


def welch_t_test(first: Floats, second: Floats) -> TTest | None:
    """t-test of two means without assuming equal variances."""
    error, freedom = _welch_error(first, second)
    return _t_test(float(second.mean() - first.mean()), error, freedom) if error else None


def welch_interval(first: Floats, second: Floats) -> tuple[float, float] | None:
    """95 % interval of the difference of means, second - first, of independent values such as final losses of seeds."""
    error, freedom = _welch_error(first, second)
    if not error:
        return None
    difference, reach = float(second.mean() - first.mean()), error * quantile(0.5 + CONFIDENCE / 2, freedom)
    return difference - reach, difference + reach


def _welch_error(first: Floats, second: Floats) -> tuple[float, float]:
    """Standard error of the difference of two means and its degrees of freedom; 0 where there is no spread."""
    if min(len(first), len(second)) < 2:
        return 0.0, 0.0
    a, b = float(first.var(ddof=1)) / len(first), float(second.var(ddof=1)) / len(second)
    if a + b == 0:
        return 0.0, 0.0
    return math.sqrt(a + b), (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1))


def cohens_d(first: Floats, second: Floats) -> float | None:
    """Difference of means, second - first, in units of the pooled standard deviation."""
    if min(len(first), len(second)) < 2:
        return None
    squares = (len(first) - 1) * float(first.var(ddof=1)) + (len(second) - 1) * float(second.var(ddof=1))
    pooled = math.sqrt(squares / (len(first) + len(second) - 2))
    return float(second.mean() - first.mean()) / pooled if pooled else None


def autocorrelation(values: Floats) -> float:
    """Correlation of each value with the one after it; 0 for fewer than three values or no spread."""
    centred = values - values.mean()
    total = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / total if len(values) > 2 and total > 0 else 0.0


def effective_count(values: Floats) -> float:
    """As many independent values would tell as much, if the dependence is that of an AR(1) process."""
    correlation = min(max(autocorrelation(values), 0.0), 0.999)
    return max(1.0, len(values) * (1 - correlation) / (1 + correlation))


def block_length(values: Floats) -> int:
    """Length of the bootstrap's blocks for an AR(1) process (Carlstein 1986), at most a quarter of the values."""
    correlation = min(abs(autocorrelation(values)), 0.99)
    ideal = (math.sqrt(6) * correlation / (1 - correlation**2)) ** (2 / 3) * len(values) ** (1 / 3)
    return int(min(max(1, math.ceil(ideal), round(len(values) ** (1 / 3))), max(1, len(values) // 4)))


def bootstrap_interval(differences: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences by circular block bootstrap; the same seed, the same interval."""
    count, length = len(differences), block_length(differences)
    blocks = math.ceil(count / length)
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, blocks))
    doubled = np.concatenate([[0.0], np.cumsum(np.concatenate([differences, differences]))])
    # The last block is cut, so that every resample has exactly as many values as there are.
    lengths = np.full(blocks, length)
    lengths[-1] = count - length * (blocks - 1)
    means = (doubled[starts + lengths] - doubled[starts]).sum(axis=1) / count
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _t_test(difference: float, error: float, freedom: float) -> TTest:
    return TTest(difference / error, freedom, two_sided_p(difference / error, freedom))
