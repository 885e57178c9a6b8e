"""Curves by step: of one run, a figure per metric with its jobs as panels, and of several runs side by side.

Of a run, backbone, experts, baselines and calibration are panels on one value axis; of a comparison, each metric has a
figure with one panel per job, and an overview shows all metrics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from modularforge.observe.canvas import (
    EXPERT_COLOURS,
    GREY,
    NARROW_INCHES,
    PALE,
    RUN_COLOURS,
    WIDTH_INCHES,
    colour_of,
    house_style,
    label_ends,
    new_figure,
    png_bytes,
    shades,
    shape_axis,
    shape_steps,
)
from modularforge.observe.completion import parts_of
from modularforge.observe.metrics import CURVES, Curve, Floats, Metric
from modularforge.observe.run import WORKER_NAME, Run, kind_of, without_members
from modularforge.observe.table import rough
from modularforge.pipeline import STAGES, JobName

if TYPE_CHECKING:  # the report of a run compares nothing, and need not wait for scipy
    from modularforge.observe.comparison import Comparison, MetricComparison

PANELS = tuple(dict.fromkeys(stage.panel for stage in reversed(STAGES.values()) if stage.panel))[::-1]
PANEL_WEIGHTS = {"backbone": 1.4, "experts": 1.6, "branches": 1.6, "baselines": 1.0, "calibration": 0.75}
PANELS_OF_A_ROW, ROW_INCHES = 4, 3.6
NOISY_POINTS = 60  # more than these hide each other: a smoothed line is drawn over them
MARKED_POINTS = 15  # of so few, each is marked
SMOOTH_SHARE = 0.04  # of the points: noise is gone, and a spike of a few steps still seen
ALIKE = 0.02  # of the axis: less than the height of a label
SMOOTH_ALREADY = ("learning_rate", "peak_memory_bytes")
MOST_PANELS = 4  # of a comparison


def curve_figures(run: Run, narrow: Collection[str] = ()) -> dict[str, Figure]:
    """Figures by metric column, for the metrics that the run has; with `narrow` only these, panel below panel."""
    found: dict[str, Figure] = {}
    for metric in CURVES:
        panels = {} if narrow and metric.column not in narrow else _panels(run, metric.column)
        if panels:
            found[metric.column] = _draw(run, metric, panels, bool(narrow))
    return found


def smooth(values: Floats) -> Floats:
    """Centred running mean over a small share of the points; windows shrink at the ends."""
    half = max(1, int(len(values) * SMOOTH_SHARE / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), half)
    smoothed: Floats = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return smoothed


def _panels(run: Run, column: str) -> dict[str, dict[str, Curve]]:
    """Curves by panel and job; jobs without a finite value in this column are left out."""
    found: dict[str, dict[str, Curve]] = {}
    for name, job in run.jobs.items():
        curve = job.curves.get(column)
        if curve is not None and len(curve.finite()):
            stage = STAGES.get(JobName.parse(name).stage)
            found.setdefault(stage.panel if stage else name, {})[name] = curve.finite()
    ordered = [*PANELS, *(name for name in found if name not in PANELS)]
    return {name: found[name] for name in ordered if name in found}


def _draw(run: Run, metric: Metric, panels: dict[str, dict[str, Curve]], narrow: bool) -> Figure:
    rows = [[name] for name in panels] if narrow else _rows(list(panels))
    figure = new_figure(NARROW_INCHES if narrow else WIDTH_INCHES, ROW_INCHES * len(rows))
    places = _add_panels(figure, rows, (0.18, 0.84) if narrow else (0.09, 0.92))
    planned = {part.name: part.steps or 0 for part in parts_of(run)}
    for axes, (name, curves) in zip(places, panels.items(), strict=True):
        width, noise = (1.0, 0.08) if len(curves) > len(EXPERT_COLOURS) else (2.0, 0.3)
        for job, curve in curves.items():
            _draw_curve(axes, metric, curve, colour_of(job, run.num_experts), width, noise)
        axes.set_title(_title(name, list(curves)), fontweight="bold", y=1.0)  # fixed: the key stands beside it
        axes.set_xlabel("step")
        ends = [max(planned.get(job, 0), curve.steps[-1]) for job, curve in curves.items()]
        axes.set_xlim(0, max(ends))
        axes.patch.set_visible(False)  # labels of the panel before may reach in here
        shape_steps(axes)
    places[0].set_ylabel(metric.axis)
    shape_axis(places[0], metric)
    for axes, curves in zip(places, panels.values(), strict=True):
        _label(axes, metric, curves, run.num_experts)
    return figure


def _rows(names: list[str]) -> list[list[str]]:
    """Panels by row: one row, or two where that would be crowded."""
    half = len(names) if len(names) <= PANELS_OF_A_ROW else (len(names) + 1) // 2
    return [row for row in (names[:half], names[half:]) if row]


def _add_panels(figure: Figure, rows: list[list[str]], sides: tuple[float, float]) -> list[Any]:
    """Axes of all panels, row by row, with one value axis; margins are the same inches for any number of rows."""
    margin = 1 / len(rows)
    places: list[Any] = []
    grid = figure.add_gridspec(
        len(rows), 1, left=sides[0], right=sides[1], bottom=0.19 * margin, top=1 - 0.12 * margin, hspace=0.45
    )
    for number, row in enumerate(rows):
        weights = [PANEL_WEIGHTS.get(name, 1.0) for name in row]
        spec = grid[number].subgridspec(1, len(row), wspace=0.40, width_ratios=weights)
        for column in range(len(row)):
            axes = figure.add_subplot(spec[column], sharey=places[0] if places else None)
            axes.tick_params(labelleft=not column)
            places.append(axes)
    return places


def _title(panel: str, jobs: list[str]) -> str:
    """How many there are of what, or which baseline it is."""
    if len(jobs) == 1:
        return {"baselines": f"{jobs[0]} baseline", "calibration": panel}.get(panel, jobs[0])
    return f"{len(jobs)} {panel}" if panel in ("experts", "branches") else panel


def _draw_curve(
    axes: Any, metric: Metric, curve: Curve, colour: Any, width: float = 2.0, noise: float = 0.2, shared: float = np.inf
) -> None:
    """Points where there are few; where they are many and noisy, a pale line with a smoothed one over it.

    What lies beyond the step up to which it is `shared` with other curves is pale too.
    """
    values, line = curve.values * metric.factor, _shown(metric, curve)
    if not np.array_equal(values, line):
        axes.plot(curve.steps, values, color=colour, linewidth=0.7, alpha=noise)
    within = curve.steps <= shared
    if not within.all():
        after = slice(max(0, int(within.sum()) - 1), None)  # from the last shared point on, so that there is no gap
        axes.plot(curve.steps[after], line[after], color=colour, linewidth=1.2, alpha=0.4)
    marker = "o" if len(curve) <= MARKED_POINTS else ""
    style = {"color": colour, "linewidth": width, "marker": marker, "markersize": 5, "clip_on": not marker}
    axes.plot(curve.steps[within], line[within], **style)


def _shown(metric: Metric, curve: Curve) -> Floats:
    """Values in the shown unit, smoothed where they are many and noisy."""
    values = curve.values * metric.factor
    if len(curve) <= NOISY_POINTS or metric.column in SMOOTH_ALREADY:
        return values
    return np.exp(smooth(np.log(values))) if metric.scale == "log" and (values > 0).all() else smooth(values)


def _label(axes: Any, metric: Metric, curves: dict[str, Curve], num_experts: int) -> None:
    """The last value of a single curve; of several the index of the expert, of very many those at both ends."""
    ends = {job: float(_shown(metric, curve)[-1]) for job, curve in curves.items()}
    value = max(ends.values())
    if len(curves) == 1:
        label_ends(axes, [(value, rough(value), colour_of(next(iter(curves)), num_experts))])
    elif _are_alike(axes, list(ends.values())) and all(map(WORKER_NAME.fullmatch, ends)):
        label_ends(axes, [(value, rough(value), GREY)])
    else:
        chosen = list(ends)
        if len(chosen) > len(EXPERT_COLOURS):
            ranked = sorted(ends, key=lambda job: ends[job])
            chosen = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
            _add_key(axes, num_experts)
        label_ends(axes, [(ends[job], _short(job), colour_of(job, num_experts)) for job in chosen])


def _are_alike(axes: Any, values: list[float]) -> bool:
    """Whether values lie so close together on their axis that one label does for all."""
    box = axes.get_window_extent()
    heights = [axes.transData.transform((0, value))[1] for value in (min(values), max(values))]
    return bool(heights[1] - heights[0] < ALIKE * box.height)


def _short(job: str) -> str:
    """The index of an expert or branch, or the name of another job."""
    match = WORKER_NAME.fullmatch(job)
    return match[2] if match else job


def _add_key(axes: Any, num_experts: int) -> None:
    """A strip beside the title that tells which shade is which expert."""
    strip = axes.inset_axes((0.62, 1.055, 0.3, 0.035))
    strip.imshow(np.arange(256)[None], aspect="auto", cmap=shades(num_experts))
    strip.set_axis_off()
    for place, text, side in ((-0.04, "0", "right"), (1.04, str(num_experts - 1), "left")):
        strip.text(place, 0.5, text, transform=strip.transAxes, ha=side, va="center", fontsize=11)
    strip.patch.set_edgecolor(PALE)


def draw_comparison(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """File names without ending, and PNG bytes: each metric, then `overview`."""
    with house_style():
        shown = [metric for metric in CURVES if _jobs_with(comparison, metric)]
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
        _draw_runs(axes, comparison, comparison.jobs[job].metrics[metric.column])
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
        _draw_runs(axes, comparison, one, marks=False)
        axes.tick_params(labelsize=11)
        drawn.append(axes)
    if drawn:
        shape_axis(drawn[0], metric)
        drawn[0].tick_params(labelleft=True)
        drawn[0].set_ylabel(metric.axis.replace(" (", "\n("), fontsize=12)


def _draw_runs(axes: Any, comparison: Comparison, one: MetricComparison, *, marks: bool = True) -> None:
    """Curves of all runs; what lies beyond the steps that all share is pale, and where they diverge is marked."""
    curves = {name: one.curves[name].finite() for name in one.summaries}
    shared = min(curve.steps[-1] for curve in curves.values())
    for name, curve in curves.items():
        _draw_curve(axes, one.metric, curve, colour_of_run(comparison, name), shared=shared)
    axes.set_xlim(0, max(curve.steps[-1] for curve in curves.values()))
    axes.patch.set_visible(False)
    shape_steps(axes)
    found = [divergence for pair in one.pairs.values() if (divergence := pair.divergence(comparison.band))]
    if marks and one.metric.learns and found:
        first = min(found, key=lambda divergence: divergence.step)
        axes.axvline(first.step, color=GREY, linewidth=1.2, linestyle=(0, (3, 3)))
        left = first.step > sum(axes.get_xlim()) / 2  # where the labels of the runs do not stand
        style: dict[str, Any] = {"fontsize": 12, "color": GREY, "ha": "right" if left else "left"}
        place, offset = (first.step, 1), (-5 if left else 5, -14)
        text = f"diverge at {first.step:,}"
        axes.annotate(text, place, offset, ("data", "axes fraction"), "offset points", **style)


def _label_runs(panels: Any, comparison: Comparison, shown: Sequence[MetricComparison | None]) -> None:
    """Each run's name behind its curve, in the last panel that has it."""
    named: set[str] = set()
    for axes, one in reversed(list(zip(panels, shown, strict=True))):
        if one is None or len(one.summaries) < 2:
            continue
        ends = {name: float(_shown(one.metric, one.curves[name].finite())[-1]) for name in one.summaries}
        label_ends(axes, [(ends[name], name, colour_of_run(comparison, name)) for name in ends if name not in named])
        named |= set(ends)


def colour_of_run(comparison: Comparison, name: str) -> str:
    """The colour of a run in all figures of a comparison; the reference is ink."""
    return RUN_COLOURS[list(comparison.runs).index(name) % len(RUN_COLOURS)]
