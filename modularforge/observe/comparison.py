"""Everything that is known of several runs side by side, as data; text, JSON and plots are made from it.

Runs that differ by their seed alone are one experiment done several times; their spread weighs every difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from modularforge.observe.anomalies import Anomaly, Convergence, Overfitting, convergence, find_anomalies, overfitting
from modularforge.observe.divergence import Pair, Summary, pair_curves, summarise, welch_interval
from modularforge.observe.metrics import CURVES, Curve, Metric, measured
from modularforge.observe.run import MEANS, Run, flatten, job_order, kind_of

# Where a run lies and runs says nothing of what it computes.
PLACES = ("name", "output_dir", "data_dir", "launcher", "cluster")


@dataclass(frozen=True)
class MetricComparison:
    """One column of one job in all runs that have it; `pairs` compare each run with the reference."""

    metric: Metric
    curves: dict[str, Curve]
    summaries: dict[str, Summary]
    convergence: dict[str, Convergence]
    anomalies: dict[str, list[Anomaly]]
    pairs: dict[str, Pair]
    missing: list[str]


@dataclass(frozen=True)
class JobComparison:
    """One job in all runs that have it."""

    name: str
    metrics: dict[str, MetricComparison]
    overfitting: dict[str, Overfitting]


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


@dataclass(frozen=True)
class Comparison:
    """All of it; the first run is the reference."""

    runs: dict[str, Run]
    band: float
    jobs: dict[str, JobComparison]
    settings: dict[str, dict[str, str]]
    evaluation: dict[str, dict[str, dict[str, float]]]
    """By metric of the evaluation, model and run."""
    seeds: SeedGroups | None = field(default=None)

    @property
    def have_one_tokenizer(self) -> bool:
        """Whether a token is the same text in all runs; if not, losses and perplexities by token are not comparable."""
        return len(set(tokenizers(self.runs).values())) < 2

    @property
    def reference(self) -> str:
        """Name of the run that the others are compared with."""
        return next(iter(self.runs))

    @property
    def are_equal(self) -> bool:
        """Whether no loss of any job differs anywhere, and every job is in all runs."""
        losses = [
            comparison.metrics[column]
            for comparison in self.jobs.values()
            for column in ("loss", "validation_loss")
            if column in comparison.metrics
        ]
        return bool(losses) and all(not one.missing and all(p.is_equal for p in one.pairs.values()) for one in losses)


def compare(runs: Mapping[str, Run], band: float = 2.0) -> Comparison:
    """Compare runs with the first of them on what they share."""
    curves = {name: curves_of(run) for name, run in runs.items()}
    names = {job for jobs in curves.values() for job in jobs}
    jobs = {job: _compare_job(job, curves, band) for job in sorted(names, key=_order)}
    return Comparison(
        dict(runs), band, jobs, differing_settings(runs), _evaluation(runs), compare_seeds(runs, final_losses(curves))
    )


def tokenizers(runs: Mapping[str, Run]) -> dict[str, str]:
    """What tells the tokenizer of each run: its bytes, or where these are not known of all what it is made by.

    Hashes of two algorithms say nothing of each other.
    """
    artifacts = {name: run.artifacts.get("prepare-data") for name, run in runs.items()}
    entries = {name: found and found.manifest.files.get("tokenizer.json") for name, found in artifacts.items()}
    known = {name: entry.digest for name, entry in entries.items() if entry}
    are_alike = len({entry.algorithm for entry in entries.values() if entry}) == 1
    return known if are_alike and len(known) == len(runs) else {name: _made_by(run) for name, run in runs.items()}


def _made_by(run: Run) -> str:
    settings = dict(flatten(run.config))
    return json.dumps([settings.get(name) for name in ("data.vocab_size", "model.pretrained")])


def curves_of(run: Run) -> dict[str, dict[str, Curve]]:
    """Curves by job and column; where there are several experts or branches, their mean is a job of its own."""
    found = {name: dict(job.curves) for name, job in run.jobs.items()}
    for kind, mean in MEANS.items():
        members = [curves for name, curves in found.items() if kind_of(name) == kind]
        if len(members) > 1:
            columns = set.intersection(*(set(curves) for curves in members))
            found[mean] = {column: mean_curve([curves[column] for curves in members]) for column in columns}
    return found


def mean_curve(curves: list[Curve]) -> Curve:
    """Mean over curves at the steps that all of them have."""
    steps = reduce(np.intersect1d, (curve.steps for curve in curves))
    values = np.mean([curve.values[np.searchsorted(curve.steps, steps)] for curve in curves], axis=0)
    return Curve(steps, values)


def final_losses(curves: Mapping[str, dict[str, dict[str, Curve]]]) -> dict[str, dict[str, float]]:
    """The last finite validation loss by job and run."""
    found: dict[str, dict[str, float]] = {}
    for name, jobs in curves.items():
        for job, columns in jobs.items():
            curve = columns["validation_loss"].finite() if "validation_loss" in columns else None
            if curve is not None and len(curve):
                found.setdefault(job, {})[name] = float(curve.values[-1])
    return found


def differing_settings(runs: Mapping[str, Run]) -> dict[str, dict[str, str]]:
    """Settings that are not the same in all runs, names and places aside."""
    values = {name: dict(flatten(run.config)) for name, run in runs.items()}
    settings = {setting for found in values.values() for setting in found if setting.split(".")[0] not in PLACES}
    rows = {setting: {name: values[name].get(setting, "–") for name in runs} for setting in sorted(settings)}
    return {setting: row for setting, row in rows.items() if len(set(row.values())) > 1}


def _compare_job(job: str, curves: Mapping[str, dict[str, dict[str, Curve]]], band: float) -> JobComparison:
    columns = {name: jobs[job] for name, jobs in curves.items() if job in jobs}
    metrics = {}
    for metric in CURVES:
        found = {name: curve for name, own in columns.items() if (curve := own.get(metric.column)) and len(curve)}
        if found:
            metrics[metric.column] = _compare_metric(metric, found, list(curves), band)
    judged = {name: overfitting(own.get("loss"), own.get("validation_loss")) for name, own in columns.items()}
    return JobComparison(job, metrics, {name: found for name, found in judged.items() if found})


def _compare_metric(metric: Metric, curves: dict[str, Curve], names: list[str], band: float) -> MetricComparison:
    finite = {name: curve.finite() for name, curve in curves.items() if len(curve.finite())}
    settled = {name: convergence(curve) for name, curve in finite.items() if metric.learns}
    reference = curves.get(names[0])
    others = {name: curve for name, curve in curves.items() if name != names[0]}
    return MetricComparison(
        metric,
        curves,
        {name: summarise(curve, metric.better) for name, curve in finite.items()},
        {name: state for name, state in settled.items() if state},
        {name: find_anomalies(curve, metric.scale == "log", metric.learns) for name, curve in curves.items()},
        {name: pair_curves(reference, curve, band) for name, curve in others.items()} if reference else {},
        [name for name in names if name not in curves],
    )


def _evaluation(runs: Mapping[str, Run]) -> dict[str, dict[str, dict[str, float]]]:
    """What the evaluations measured, by metric, model and run; models in the order of the longest table."""
    models: dict[str, dict[str, Any]] = {name: (run.evaluation or {}).get("models", {}) for name, run in runs.items()}
    metrics = dict.fromkeys(metric for run in runs.values() for metric in measured(run.evaluation or {}))
    order = dict.fromkeys(model for found in sorted(models.values(), key=len, reverse=True) for model in found)
    return {
        metric.column: {
            model: {
                name: float(found[model][metric.column])
                for name, found in models.items()
                if metric.column in found.get(model, {})
            }
            for model in order
        }
        for metric in metrics
        if order
    }


def _order(job: str) -> tuple[float, int, str]:
    """As the pipeline runs them, a mean before its members."""
    kind = next((kind for kind, mean in MEANS.items() if mean == job), None)
    return (job_order(f"{kind}-0")[0] - 0.5, 0, job) if kind else job_order(job)


def compare_seeds(runs: Mapping[str, Run], losses: Mapping[str, Mapping[str, float]]) -> SeedGroups | None:
    """Means over seeds and the Welch interval of their difference; None when no group has several seeds."""
    groups = group_by_settings(runs)
    if all(len(members) < 2 for members in groups.values()):
        return None
    return SeedGroups(groups, [result for job, found in losses.items() for result in _seed_results(job, found, groups)])


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


def _seed_results(job: str, losses: Mapping[str, float], groups: dict[str, list[str]]) -> list[SeedResult]:
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
    return {name: value for name, value in config.items() if name not in (*PLACES, "seed")}
