"""Runs that differ by their seed alone are one experiment done several times; their spread weighs every difference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modularforge.comparison.statistics import welch_interval
from modularforge.observe.run import Run

NOT_COMPARED = ("seed", "name", "output_dir", "data_dir", "launcher", "cluster")


@dataclass(frozen=True)
class SeedResult:
    """Final validation losses of one job in one group."""

    job: str
    group: str
    losses: list[float]
    mean: float
    standard_deviation: float
    difference: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SeedGroups:
    """Groups by the name of their first run, and the results by job; differences are from the first group."""

    groups: dict[str, list[str]]
    results: list[SeedResult]


def compare_seeds(runs: Mapping[str, Run], losses: Mapping[str, Mapping[str, float]]) -> SeedGroups | None:
    """Means over seeds and the Welch interval of their difference; None when no group has several seeds."""
    groups = group_by_settings(runs)
    if all(len(members) < 2 for members in groups.values()):
        return None
    return SeedGroups(groups, [result for job, found in losses.items() for result in _compare_job(job, found, groups)])


def group_by_settings(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Names of runs with the same settings but for the seed; a run without known settings or seed stands alone.

    A run that repeats a seed is no further seed (its code may be another): second runs are a group of their own.
    """
    groups: list[tuple[str, dict[Any, str]]] = []
    for name, run in runs.items():
        seed = run.setting("seed", -1)
        key = f"alone: {name}" if seed < 0 else json.dumps(_without_seed(run.config), sort_keys=True)
        group = next((members for other, members in groups if other == key and seed not in members), None)
        if group is None:
            group = {}
            groups.append((key, group))
        group[seed] = name
    return {next(iter(members.values())): list(members.values()) for _, members in groups}


def _compare_job(job: str, losses: Mapping[str, float], groups: dict[str, list[str]]) -> list[SeedResult]:
    values = {group: np.array([losses[name] for name in names if name in losses]) for group, names in groups.items()}
    values = {group: found for group, found in values.items() if len(found)}
    reference = next(iter(groups))
    results = []
    for group, found in values.items():
        spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
        against = None if group == reference else values.get(reference)
        difference = None if against is None else float(found.mean() - against.mean())
        interval = None if against is None else welch_interval(against, found)
        results.append(SeedResult(job, group, found.tolist(), float(found.mean()), spread, difference, interval))
    return results


def _without_seed(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in NOT_COMPARED}
