"""Two curves held against each other: where they diverge, by how much they differ, and how sure that is.

Curves diverge at the first common step at which their ratio leaves a band, up or down. Neighbouring points of one curve
are not independent, so the t-tests say too much; the block bootstrap resamples stretches instead of points (Politis and
Romano 1992, the circular variant).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from modularforge.observe.metrics import Curve, Floats

RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 resamples each
CONFIDENCE = 0.95
CAVEAT = (
    "The points of one curve are not independent: t-test and Cohen's d take them as if they were and overstate the "
    "evidence. Trust the block bootstrap, and several seeds most."
)
# Bands that are always looked at beside the one asked for: curves diverge gradually.
FINE_BANDS = (1.05, 1.25)
# A bootstrap of fewer points knows too little of their spread.
FEWEST_FOR_INTERVAL = 8


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


@dataclass(frozen=True)
class Divergence:
    """The first step outside 1/band … band with the ratio there, and from which step on it stays outside."""

    band: float
    step: int
    ratio: float
    for_good_from: int | None


@dataclass(frozen=True)
class Pair:
    """Differences are run minus reference; ratios are reference over run."""

    common_steps: int
    first_step: int | None = None
    last_step: int | None = None
    first_difference: int | None = None
    mean_difference: float | None = None
    interval: tuple[float, float] | None = None
    block_length: int | None = None
    effective_count: float | None = None
    final_difference: float | None = None
    final_ratio: float | None = None
    divergences: tuple[Divergence, ...] = ()
    paired_t_test: TTest | None = None
    welch_t_test: TTest | None = None
    cohens_d: float | None = None

    @property
    def is_equal(self) -> bool:
        """Whether the curves agree to the last bit wherever both have a step."""
        return self.common_steps > 0 and self.first_difference is None

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the mean difference excludes 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    def divergence(self, band: float) -> Divergence | None:
        """Where the curves leave this band."""
        return next((divergence for divergence in self.divergences if divergence.band == band), None)


def pair_curves(reference: Curve, other: Curve, band: float) -> Pair:
    """Everything that is said about two curves; little when they share no step."""
    steps, first, second = on_common_steps(reference, other)
    if not len(steps):
        return Pair(0)
    differences = second - first
    bands = sorted({*FINE_BANDS, band})
    divergences = (find_divergence(steps, first, second, edge) for edge in bands)
    return Pair(
        common_steps=len(steps),
        first_step=int(steps[0]),
        last_step=int(steps[-1]),
        first_difference=first_difference(steps, first, second),
        mean_difference=float(differences.mean()),
        interval=bootstrap_interval(differences) if len(steps) >= FEWEST_FOR_INTERVAL else None,
        block_length=block_length(differences),
        effective_count=effective_count(differences),
        final_difference=float(differences[-1]),
        final_ratio=float(ratios(first, second)[-1]),
        divergences=tuple(divergence for divergence in divergences if divergence),
        paired_t_test=paired_t_test(first, second),
        welch_t_test=welch_t_test(first, second),
        cohens_d=cohens_d(first, second),
    )


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


def find_divergence(steps: Floats, first: Floats, second: Floats, band: float) -> Divergence | None:
    """Where the ratio first / second first leaves 1/band … band; None when it never does."""
    ratio = ratios(first, second)
    outside = (ratio > band) | (ratio < 1 / band)
    if not outside.any():
        return None
    index = int(np.argmax(outside))
    inside = np.flatnonzero(~outside)
    back = int(inside[-1]) + 1 if len(inside) else 0
    return Divergence(band, int(steps[index]), float(ratio[index]), int(steps[back]) if back < len(steps) else None)


def first_difference(steps: Floats, first: Floats, second: Floats) -> int | None:
    """The first step at which the values are not equal to the last bit."""
    unequal = np.flatnonzero(first != second)
    return int(steps[unequal[0]]) if len(unequal) else None


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
    if len(first) < 2 or not float((second - first).std(ddof=1)):
        return None
    return _t_test(_quietly(stats.ttest_rel, second, first))


def welch_t_test(first: Floats, second: Floats) -> TTest | None:
    """t-test of two means without assuming equal variances; None when there is no spread to compare them with."""
    if min(len(first), len(second)) < 2 or not float(first.var(ddof=1) + second.var(ddof=1)):
        return None
    return _t_test(_welch(first, second))


def welch_interval(first: Floats, second: Floats) -> tuple[float, float] | None:
    """95 % interval of the difference of means, second - first, of independent values such as final losses of seeds."""
    if welch_t_test(first, second) is None:
        return None
    low, high = _welch(first, second).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def _welch(first: Floats, second: Floats) -> Any:
    return _quietly(stats.ttest_ind, second, first, equal_var=False)


def _quietly(test: Callable[..., Any], *values: Floats, **options: Any) -> Any:
    """A test without scipy's warning of values that hardly differ: curves of two equal runs are such."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return test(*values, **options)


def _t_test(found: Any) -> TTest:
    return TTest(float(found.statistic), float(found.df), float(found.pvalue))


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
