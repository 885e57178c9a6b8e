"""One figure per metric: backbone, experts, dense baseline and calibration side by side on one value axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from modularforge.observe.canvas import label_ends, new_figure, plain, shape_axis, shape_steps
from modularforge.observe.metrics import METRICS, Curve, Floats, Metric
from modularforge.observe.progress import parts_of
from modularforge.observe.run import STAGE_OF_JOB, Run
from modularforge.observe.style import EXPERT_COLOURS, GREY, PALE, WIDTH_INCHES, colour_of, shades

PANELS = ("backbone", "experts", "dense", "calibration")
TITLES = {"dense": "dense baseline"}
PANEL_WEIGHTS = {"backbone": 1.4, "experts": 1.6, "dense": 1.0, "calibration": 0.75}
NOISY_POINTS = 60
MARKED_POINTS = 15
SMOOTH_SHARE = 0.04
ALIKE = 0.02
SMOOTH_ALREADY = ("learning_rate", "peak_memory_bytes")


def curve_figures(run: Run) -> dict[str, Figure]:
    """Figures by metric column, for the metrics that the run has."""
    found: dict[str, Figure] = {}
    for metric in METRICS:
        panels = _panels(run, metric.column)
        if panels:
            found[metric.column] = _draw(run, metric, panels)
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
            found.setdefault("experts" if name.startswith("expert-") else name, {})[name] = curve.finite()
    ordered = [*PANELS, *(name for name in found if name not in PANELS)]
    return {name: found[name] for name in ordered if name in found}


def _draw(run: Run, metric: Metric, panels: dict[str, dict[str, Curve]]) -> Figure:
    figure = new_figure(WIDTH_INCHES, 3.6)
    weights = [PANEL_WEIGHTS.get(name, 1.0) for name in panels]
    grid: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=weights)
    figure.subplots_adjust(wspace=0.40, left=0.09, right=0.94, bottom=0.19, top=0.88)
    planned = {part.name: part.steps or 0 for part in parts_of(run)}
    for axes, (name, curves) in zip(grid[0], panels.items(), strict=True):
        for job, curve in curves.items():
            _draw_curve(axes, metric, curve, colour_of(job, run.num_experts), len(curves) > len(EXPERT_COLOURS))
        title = f"{len(curves)} experts" if name == "experts" and len(curves) > 1 else TITLES.get(name, name)
        axes.set_title(title, fontweight="bold")
        axes.set_xlabel("step")
        ends = [max(planned.get(STAGE_OF_JOB.get(job, job), 0), curve.steps[-1]) for job, curve in curves.items()]
        axes.set_xlim(0, max(ends))
        axes.patch.set_visible(False)  # labels of the panel before may reach in here
        shape_steps(axes)
    grid[0][0].set_ylabel(metric.axis)
    shape_axis(grid[0][0], metric)
    for axes, (name, curves) in zip(grid[0], panels.items(), strict=True):
        _label(axes, metric, name, curves, run.num_experts)
    return figure


def _draw_curve(axes: Any, metric: Metric, curve: Curve, colour: Any, crowded: bool) -> None:
    """Points where there are few; where they are many and noisy, a pale line with a smoothed one over it."""
    values, shown = curve.values * metric.factor, _shown(metric, curve)
    if not np.array_equal(shown, values):
        axes.plot(curve.steps, values, color=colour, linewidth=0.7, alpha=0.08 if crowded else 0.3)
    marker = "o" if len(curve) <= MARKED_POINTS else ""
    line = {"color": colour, "linewidth": 1.0 if crowded else 2.0, "marker": marker, "markersize": 5}
    axes.plot(curve.steps, shown, clip_on=not marker, **line)


def _shown(metric: Metric, curve: Curve) -> Floats:
    """Values in the shown unit, smoothed where they are many and noisy."""
    values = curve.values * metric.factor
    if len(curve) <= NOISY_POINTS or metric.column in SMOOTH_ALREADY:
        return values
    return np.exp(smooth(np.log(values))) if metric.scale == "log" and (values > 0).all() else smooth(values)


def _label(axes: Any, metric: Metric, panel: str, curves: dict[str, Curve], num_experts: int) -> None:
    """The last value of a single curve; of several the index of the expert, of very many those at both ends."""
    ends = {job: float(_shown(metric, curve)[-1]) for job, curve in curves.items()}
    low, high = axes.get_ylim()
    value = max(ends.values())
    if len(curves) == 1:
        label_ends(axes, [(value, plain(value), colour_of(next(iter(curves)), num_experts))])
    elif value - min(ends.values()) < ALIKE * (high - low):
        label_ends(axes, [(value, plain(value), GREY)])
    else:
        chosen = list(ends)
        if len(chosen) > len(EXPERT_COLOURS):
            ranked = sorted(ends, key=lambda job: ends[job])
            chosen = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
            _add_key(axes, num_experts)
        label_ends(axes, [(ends[job], job.removeprefix("expert-"), colour_of(job, num_experts)) for job in chosen])


def _add_key(axes: Any, num_experts: int) -> None:
    """A strip that tells which shade is which expert."""
    strip = axes.inset_axes((0.62, 0.955, 0.3, 0.035))
    strip.imshow(np.arange(256)[None], aspect="auto", cmap=shades(num_experts))
    strip.set_axis_off()
    for place, text, side in ((-0.04, "0", "right"), (1.04, str(num_experts - 1), "left")):
        strip.text(place, 0.5, text, transform=strip.transAxes, ha=side, va="center", fontsize=11)
    strip.patch.set_edgecolor(PALE)
