"""Runs side by side: a figure per metric with one panel per job, and an overview of all metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from modularforge.comparison.comparison import Comparison, MetricComparison, kind_of, without_members
from modularforge.observe.canvas import label_ends, new_figure, png_bytes, shape_axis, shape_steps
from modularforge.observe.curve_figures import smooth
from modularforge.observe.metrics import METRICS, Curve, Floats, Metric
from modularforge.observe.style import GREY, RUN_COLOURS, WIDTH_INCHES, house_style

MOST_PANELS = 4
NOISY_POINTS = 60
MARKED_POINTS = 15


def draw_comparison(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """File names without ending, and PNG bytes: each metric, then `overview`."""
    with house_style():
        shown = [metric for metric in METRICS if _jobs_with(comparison, metric)]
        for metric in shown:
            yield metric.column, png_bytes(_metric_figure(comparison, metric))
        if shown:
            yield "overview", png_bytes(_overview(comparison, shown))


def _jobs_with(comparison: Comparison, metric: Metric) -> list[str]:
    """Jobs with this metric in two runs or more, those of most runs first to be kept; single experts only if few."""
    jobs = [
        name
        for name, job in comparison.jobs.items()
        if metric.column in job.metrics and len(job.metrics[metric.column].summaries) > 1
    ]
    singles = sum(kind_of(name) is not None for name in jobs)
    jobs = without_members(jobs, 0) if singles and len(jobs) > MOST_PANELS else jobs
    kept = sorted(jobs, key=lambda name: -len(comparison.jobs[name].metrics[metric.column].summaries))[:MOST_PANELS]
    return [name for name in jobs if name in kept]


def _metric_figure(comparison: Comparison, metric: Metric) -> Figure:
    jobs = _jobs_with(comparison, metric)
    figure = new_figure(WIDTH_INCHES, 4.0)
    grid: Any = figure.subplots(1, len(jobs), sharey=True, squeeze=False)
    figure.subplots_adjust(wspace=0.18, left=0.08, right=_right(comparison), bottom=0.16, top=0.86)
    for axes, job in zip(grid[0], jobs, strict=True):
        _draw_panel(axes, comparison, comparison.jobs[job].metrics[metric.column])
        axes.set_title(job, fontweight="bold")
        axes.set_xlabel("step")
    grid[0][0].set_ylabel(metric.axis)
    shape_axis(grid[0][0], metric)
    _label_runs(grid[0], comparison, [comparison.jobs[job].metrics[metric.column] for job in jobs])
    return figure


def _right(comparison: Comparison) -> float:
    """Where panels end, so that the longest name of a run finds room behind them."""
    return max(0.7, 0.975 - 0.0098 * max(map(len, comparison.runs)))


def _overview(comparison: Comparison, metrics: list[Metric]) -> Figure:
    """All metrics of the jobs that the runs share: metrics down, jobs across."""
    jobs = list(dict.fromkeys(job for metric in metrics for job in _jobs_with(comparison, metric)))[:MOST_PANELS]
    figure = new_figure(WIDTH_INCHES, 1.0 + 1.9 * len(metrics))
    grid: Any = figure.subplots(len(metrics), len(jobs), sharey="row", squeeze=False)
    figure.subplots_adjust(wspace=0.12, hspace=0.42, left=0.10, right=_right(comparison), bottom=0.04, top=0.96)
    for row, metric in zip(grid, metrics, strict=True):
        _draw_row(row, comparison, metric, jobs)
    for axes, job in zip(grid[0], jobs, strict=True):
        axes.set_title(job, fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.align_ylabels(grid[:, 0])
    first = [comparison.jobs[job].metrics.get(metrics[0].column) for job in jobs]
    _label_runs(grid[0], comparison, first)
    return figure


def _draw_row(row: Any, comparison: Comparison, metric: Metric, jobs: list[str]) -> None:
    """One metric of all jobs; the first panel that is there bears the value axis, shaped when all curves are drawn."""
    drawn = []
    for axes, job in zip(row, jobs, strict=True):
        one = comparison.jobs[job].metrics.get(metric.column)
        if one is None or len(one.summaries) < 2:
            axes.set_axis_off()
            continue
        _draw_panel(axes, comparison, one, marks=False)
        axes.tick_params(labelsize=11)
        drawn.append(axes)
    if drawn:
        shape_axis(drawn[0], metric)
        drawn[0].tick_params(labelleft=True)
        drawn[0].set_ylabel(metric.axis.replace(" (", "\n("), fontsize=12)


def _draw_panel(axes: Any, comparison: Comparison, one: MetricComparison, *, marks: bool = True) -> None:
    """Curves of all runs; what lies beyond the steps that all share is pale, and where they part is marked."""
    curves = {name: one.curves[name].finite() for name in one.summaries}
    shared = min(curve.steps[-1] for curve in curves.values())
    for name, curve in curves.items():
        _draw_curve(axes, one.metric, curve, colour_of_run(comparison, name), shared)
    axes.set_xlim(0, max(curve.steps[-1] for curve in curves.values()))
    axes.patch.set_visible(False)
    shape_steps(axes)
    partings = [parting for pair in one.pairs.values() if (parting := pair.parting(comparison.band))]
    if marks and one.metric.learns and partings:
        first = min(partings, key=lambda parting: parting.step)
        axes.axvline(first.step, color=GREY, linewidth=1.2, linestyle=(0, (3, 3)))
        left = first.step > sum(axes.get_xlim()) / 2  # where the labels of the runs do not stand
        axes.annotate(f"part at {first.step:,}", (first.step, 1), (-5 if left else 5, -14), ("data", "axes fraction"),
                      "offset points", fontsize=12, color=GREY, ha="right" if left else "left")  # fmt: skip


def _draw_curve(axes: Any, metric: Metric, curve: Curve, colour: str, shared: float) -> None:
    values, line = curve.values * metric.factor, _line(metric, curve)
    if not np.array_equal(values, line):
        axes.plot(curve.steps, values, color=colour, linewidth=0.6, alpha=0.2)
    within = curve.steps <= shared
    marker = "o" if len(curve) <= MARKED_POINTS else ""
    after = np.arange(len(curve)) >= max(0, int(within.sum()) - 1)
    axes.plot(curve.steps[after], line[after], color=colour, linewidth=1.2, alpha=0.4)
    axes.plot(curve.steps[within], line[within], color=colour, marker=marker, markersize=5, clip_on=not marker)


def _line(metric: Metric, curve: Curve) -> Floats:
    values = curve.values * metric.factor
    if len(curve) <= NOISY_POINTS or metric.column in ("learning_rate", "peak_memory_bytes"):
        return values
    return np.exp(smooth(np.log(values))) if metric.scale == "log" and (values > 0).all() else smooth(values)


def _label_runs(panels: Any, comparison: Comparison, shown: Sequence[MetricComparison | None]) -> None:
    """Each run's name behind its curve, in the last panel that has it."""
    named: set[str] = set()
    for axes, one in reversed(list(zip(panels, shown, strict=True))):
        if one is None or len(one.summaries) < 2:
            continue
        ends = {name: float(_line(one.metric, one.curves[name].finite())[-1]) for name in one.summaries}
        label_ends(axes, [(ends[name], name, colour_of_run(comparison, name)) for name in ends if name not in named])
        named |= set(ends)


def colour_of_run(comparison: Comparison, name: str) -> str:
    """The colour of a run in all figures of a comparison; the reference is ink."""
    return RUN_COLOURS[list(comparison.runs).index(name) % len(RUN_COLOURS)]
