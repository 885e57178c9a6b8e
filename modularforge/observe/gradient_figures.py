"""Norms of gradients as figures: by group, layer and step, with a panel for each job of a run, or each run of a job.

Lines are drawn where a group learns: a paused one has a gap, and one that is never trained has no line.
"""

# S steps  L layers

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modularforge.norm_files import GROUPS, Floats, Norms, mean_of_learning
from modularforge.observe.canvas import GREY, INK, WIDTH_INCHES, label_ends, new_figure, shape_axis, shape_steps
from modularforge.observe.curves import MARKED_POINTS, MOST_PANELS
from modularforge.observe.metrics import Metric
from modularforge.observe.run import MEANS, kind_of, without_members
from modularforge.observe.table import rough

GROUP_COLOURS = {
    "embedding": "#cc79a7", "attention": "#0072b2", "mlp": "#d55e00", "head": "#009e73", "other": GREY, "total": INK
}  # fmt: skip
BLOCKS = ("attention", "mlp")
NORM = Metric("gradient_norm", "norm of the gradient", "")
TITLES = {
    "gradient_groups": "Norms of gradients by group",
    "gradient_groups_log": "Norms of gradients by group, logarithmic",
    "gradient_ratio": "Attention against MLP: ratio of their norms",
    "gradient_layers": "Norms by layer and group, mean over the steps at which they learned",
    "gradient_layer_bars": "Norms by layer: attention and MLP",
    "gradient_evolution": "Norms by layer over the steps",
}


def norms_of_jobs(norms: Mapping[str, Norms]) -> dict[str, Norms]:
    """The jobs that figures have room for: where there are many experts, or branches, their mean stands for them."""
    found = dict(norms)
    for kind, name in MEANS.items():
        members = [one for job, one in norms.items() if kind_of(job) == kind]
        if len(members) > 1:
            found[name] = mean_norms(members)
    names = without_members(found, 0) if len(norms) > MOST_PANELS else list(norms)
    names = sorted(names, key=lambda name: name not in ("backbone", *MEANS.values()))  # before baselines
    return {name: found[name] for name in names[:MOST_PANELS]}


def mean_norms(norms: Sequence[Norms]) -> Norms:
    """Mean over jobs at the steps and layers that all of them have."""
    steps_S = reduce(np.intersect1d, (one.steps_S for one in norms))
    layers = min(one.layers_SGL.shape[2] for one in norms)
    rows = [np.searchsorted(one.steps_S, steps_S) for one in norms]
    groups_SG = np.mean([one.groups_SG[row] for one, row in zip(norms, rows, strict=True)], axis=0)
    layers_SGL = np.mean([one.layers_SGL[row][..., :layers] for one, row in zip(norms, rows, strict=True)], axis=0)
    return Norms(steps_S, groups_SG, layers_SGL)


def norm_figures(panels: Mapping[str, Norms]) -> Iterator[tuple[str, Figure]]:
    """Names of `TITLES` and figures of what was measured, with a panel for each of these by its title."""
    panels = {title: norms for title, norms in panels.items() if len(norms)}
    if not panels:
        return
    yield "gradient_groups", _by_step(panels, "from_zero")
    yield "gradient_groups_log", _by_step(panels, "log")
    rated = {title: norms for title, norms in panels.items() if np.isfinite(norms.ratio_S).any()}
    if rated:
        yield "gradient_ratio", _ratio(rated)
    layered = {
        title: norms for title, norms in panels.items() if any((norms.layers(group) > 0).any() for group in BLOCKS)
    }
    if layered:
        yield "gradient_layers", _layer_map(layered)
        yield "gradient_layer_bars", _layer_bars(layered)
        yield "gradient_evolution", _evolution(layered)


def _grid(panels: Mapping[str, Norms], rows: int = 1, share: bool = True) -> tuple[Figure, Any]:
    """A figure with a column for each panel, titles on top."""
    figure = new_figure(WIDTH_INCHES, 0.9 + 2.7 * rows)
    grid: Any = figure.subplots(rows, len(panels), sharey="row" if share else False, squeeze=False)
    bottom, top = 0.6 / (0.9 + 2.7 * rows), 1 - 0.4 / (0.9 + 2.7 * rows)
    figure.subplots_adjust(wspace=0.22 if share else 0.3, hspace=0.3, left=0.09, right=0.87, bottom=bottom, top=top)
    for axes, title in zip(grid[0], panels, strict=True):
        axes.set_title(title, fontweight="bold")
    return figure, grid


def _by_step(panels: Mapping[str, Norms], scale: Any) -> Figure:
    """All groups by step, with a key of those that learn in any panel."""
    figure, ((*places,),) = _grid(panels)
    for axes, norms in zip(places, panels.values(), strict=True):
        for group in GROUPS:
            _line(axes, norms.steps_S, norms.group(group), GROUP_COLOURS[group])
        _shape(axes, norms)
    metric = Metric(NORM.column, NORM.title, "", scale=scale)
    shape_axis(places[0], metric)
    places[0].set_ylabel(metric.axis)
    _add_key(places[-1], [g for g in GROUPS[::-1] if any((norms.group(g) > 0).any() for norms in panels.values())])
    return figure


def _add_key(axes: Any, groups: Sequence[str]) -> None:
    """Names of groups in their colours, right of the axes."""
    for place, group in enumerate(groups):
        style = {"color": GROUP_COLOURS[group], "fontsize": 12, "fontweight": "bold", "annotation_clip": False}
        axes.annotate(group, (1, 0.9 - 0.1 * place), (10, 0), "axes fraction", "offset points", **style)


def _ratio(panels: Mapping[str, Norms]) -> Figure:
    """Above 1, attention has the larger gradient."""
    figure, ((*places,),) = _grid(panels)
    for axes, norms in zip(places, panels.values(), strict=True):
        _line(axes, norms.steps_S, norms.ratio_S, INK)
        axes.axhline(1, color=GREY, linewidth=1.2, linestyle=(0, (3, 3)))
        _shape(axes, norms)
    shape_axis(places[0], Metric("ratio", "attention : MLP", "", scale="log"))
    places[0].set_ylabel("attention : MLP")
    end = _last(list(panels.values())[-1].ratio_S)
    label_ends(places[-1], [(end, rough(end), INK)])
    return figure


def _line(axes: Any, steps_S: Floats, values_S: Floats, colour: str) -> None:
    """A line with gaps where nothing learns."""
    learned_S = np.where(values_S > 0, values_S, math.nan)
    learned_S[~np.isfinite(learned_S)] = math.nan
    marker = "o" if len(steps_S) <= MARKED_POINTS else ""
    axes.plot(steps_S, learned_S, color=colour, linewidth=1.6, marker=marker, markersize=4, clip_on=not marker)


def _shape(axes: Any, norms: Norms) -> None:
    axes.set_xlim(0, norms.steps_S[-1])
    axes.set_xlabel("step")
    axes.patch.set_visible(False)
    shape_steps(axes)


def _last(values_S: Floats) -> float:
    """The last value at which something learned; `nan` where nothing ever did."""
    learned = values_S[(values_S > 0) & np.isfinite(values_S)]
    return float(learned[-1]) if len(learned) else math.nan


def _layer_map(panels: Mapping[str, Norms]) -> Figure:
    """Layers down, attention and MLP across; all panels on one scale."""
    maps = {
        title: np.stack([mean_of_learning(norms.layers(group)) for group in BLOCKS], axis=1)
        for title, norms in panels.items()
    }
    figure, ((*places,),) = _grid(panels)
    images = [_image(axes, maps[title], maps.values()) for axes, title in zip(places, maps, strict=True)]
    for axes in places:
        axes.set_xticks(range(len(BLOCKS)), BLOCKS)
    places[0].set_ylabel("layer")
    _add_scale(figure, images[0])
    return figure


def _layer_bars(panels: Mapping[str, Norms]) -> Figure:
    """Two bars for each layer."""
    figure, ((*places,),) = _grid(panels)
    for axes, norms in zip(places, panels.values(), strict=True):
        for shift, group in ((-0.2, "attention"), (0.2, "mlp")):
            heights_L = np.nan_to_num(mean_of_learning(norms.layers(group)), posinf=0.0)
            axes.bar(np.arange(len(heights_L)) + shift, heights_L, 0.4, color=GROUP_COLOURS[group])
        axes.set_xlabel("layer")
        axes.set_xlim(-0.6, norms.layers_SGL.shape[2] - 0.4)
        shape_steps(axes)
    places[0].set_ylabel(NORM.title)
    _add_key(places[-1], BLOCKS)
    return figure


def _evolution(panels: Mapping[str, Norms]) -> Figure:
    """Steps across, layers down: attention above, MLP below, on one scale."""
    figure, grid = _grid(panels, len(BLOCKS))
    everything = [norms.layers(group) for norms in panels.values() for group in BLOCKS]
    images = [
        _image(axes, norms.layers(group).T, everything, norms.steps_S)
        for group, row in zip(BLOCKS, grid, strict=True)
        for axes, norms in zip(row, panels.values(), strict=True)
    ]
    for group, row in zip(BLOCKS, grid, strict=True):
        row[0].set_ylabel(f"layer, {group}")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for row in grid:
        for axes, norms in zip(row, panels.values(), strict=True):
            axes.set_xlim(0, norms.steps_S[-1])
            shape_steps(axes)
    _add_scale(figure, images[0])
    return figure


def _image(axes: Any, values: Floats, everything: Any, steps_S: Floats | None = None) -> Any:
    """A map of logarithms, layer 0 on top; blank where nothing learns."""
    finite = np.concatenate([found[np.isfinite(found) & (found > 0)].ravel() for found in everything])
    low, high = (np.log10([finite.min(), finite.max()])) if len(finite) else (0.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.ma.masked_invalid(np.log10(values))
    extent = None if steps_S is None else (0.0, float(steps_S[-1]), len(values) - 0.5, -0.5)
    axes.grid(False)
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "cmap": "viridis"}
    image = axes.imshow(logs, vmin=low, vmax=max(high, low + 1e-6), extent=extent, **style)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return image


def _add_scale(figure: Figure, image: Any) -> None:
    place = figure.add_axes((0.895, 0.2, 0.015, 0.6))
    bar = figure.colorbar(image, cax=place, ticks=MaxNLocator(4), format=lambda value, _: rough(10.0**value))
    bar.ax.tick_params(labelsize=11)
