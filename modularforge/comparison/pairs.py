"""One curve of a run against the same curve of the reference, on the steps that both have."""

from __future__ import annotations

from dataclasses import dataclass

from modularforge.comparison.parting import Parting, find_parting, first_difference, on_common_steps, ratios
from modularforge.comparison.statistics import (
    TTest,
    block_length,
    bootstrap_interval,
    cohens_d,
    effective_count,
    paired_t_test,
    welch_t_test,
)
from modularforge.observe.metrics import Curve

# Bands that are always looked at beside the one asked for: parting is gradual.
FINE_BANDS = (1.05, 1.25)
# A bootstrap of fewer points knows too little of their spread.
FEWEST_FOR_INTERVAL = 8


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
    partings: tuple[Parting, ...] = ()
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

    def parting(self, band: float) -> Parting | None:
        """Where the curves leave this band."""
        return next((parting for parting in self.partings if parting.band == band), None)


def pair_curves(reference: Curve, other: Curve, band: float) -> Pair:
    """Everything that is said about two curves; little when they share no step."""
    steps, first, second = on_common_steps(reference, other)
    if not len(steps):
        return Pair(0)
    differences = second - first
    bands = sorted({*FINE_BANDS, band})
    partings = (find_parting(steps, first, second, edge) for edge in bands)
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
        partings=tuple(parting for parting in partings if parting),
        paired_t_test=paired_t_test(first, second),
        welch_t_test=welch_t_test(first, second),
        cohens_d=cohens_d(first, second),
    )
