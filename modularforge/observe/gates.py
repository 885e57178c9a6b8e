"""What a speech model's gates do, as a table and as figures: by layer, by domain, and frame by frame of an utterance.

`gates` is what an evaluation has in results.json by model, or what `modularforge analyze` reads off a model.
"""

# L layers (places where vectors are added)  E vectors of all experts  K experts  T frames

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from checkpoints.screen import breakable, short
from modularforge.observe.canvas import (
    INK,
    WIDTH_INCHES,
    colour_of,
    label_ends,
    letters,
    new_figure,
    shades,
    shape_steps,
)
from modularforge.observe.evaluation_figures import LABEL_CHARACTERS, WRITTEN_COLUMNS
from modularforge.observe.metrics import Floats, JobMetrics
from modularforge.observe.run import Run
from modularforge.observe.table import Table, fixed, listing, rough

Gates = Mapping[str, Any]
TITLES = {
    "usage": "Weight of vectors by layer and by domain",
    "strength": "Strength, length of vectors and scale by layer",
    "frames": "Gates frame by frame",
    "course": "Scales of layers over training",
}
MOST_COLUMNS = 8
LAYER_SCALE = "scale_"  # and the layer's number: a column of metrics
SHOWN_MODELS = ("calibrated", "assembled", "joint")


def gate_table(name: str, gates: Gates) -> Table:
    """A row for each layer: weight of each expert, or vector of a single one, evenness, strength, length, scale."""
    labels, shares_LK = _shown_shares(gates)
    norms_L = _mean_rows(gates["norm_per_layer_and_vector"])
    scales_L = _mean_rows(gates["scale_per_layer_and_expert"])
    rows = []
    for layer, norm in enumerate(norms_L):
        shares = [fixed(value, 2) for value in shares_LK[layer]] if len(shares_LK) else [None] * len(labels)
        used = [_cell(gates[key], layer, 3) for key in ("evenness_per_layer", "strength_per_layer")]
        rows.append([str(layer), *shares, *used, fixed(norm, 3), _cell(scales_L, layer, 3)])
    header = ["layer", *labels, "evenness", "strength", "vector length", "scale"]
    words = (
        "Weights add up to 1; evenness is the entropy of a frame's gates over its largest value; strength is the "
        "length of what is added to a frame over the frame's own."
    )
    return listing(header, rows, title=f"Gates of {name}", words=words)


def course_table(jobs: Mapping[str, JobMetrics]) -> Table:
    """Mean scale and length of vectors of each job, at its first and its last logged step."""
    rows = []
    for name, job in jobs.items():
        curves = [job.curves[column].finite() for column in ("scale", "vector_norm") if column in job.curves]
        ends = [f"{rough(curve.values[0])} → {rough(curve.values[-1])}" for curve in curves if len(curve)]
        if "vector_norm" in job.curves and ends:
            rows.append([name, *([None] if len(ends) == 1 else []), *ends, f"{job.last_step:,}"])
    return listing(["job", "scale", "vector length", "steps"], rows, title="Over training", words="First → last value.")


def gate_figures(gates: Gates, name: str) -> Iterator[tuple[str, Figure]]:
    """Names of `TITLES` and figures of all that is known of a model's gates."""
    if gates["share_per_layer_and_vector"]:
        yield "usage", _usage(gates, name)
    yield "strength", _by_layer(gates, name)
    if gates.get("utterance"):
        yield "frames", _frames(gates, name)


def figures_of_run(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Of the models that a report shows: model, name of the figure, figure; then scales of the jobs."""
    found = (run.evaluation or {}).get("gates") or {}
    for model in SHOWN_MODELS:
        for name, figure in gate_figures(found[model], model) if model in found else ():
            yield model, name, figure
    yield from course_figures(run)


def course_figures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Of each job with scales: its name, name of the figure, figure."""
    for name, job in run.jobs.items():
        if (figure := course_figure(job)) is not None:
            yield name, "course", figure


def course_figure(job: JobMetrics) -> Figure | None:
    """A job's scales by step, a line for each layer, the lighter the later; None where nothing was scaled or logged."""
    columns = takewhile(job.curves.__contains__, (f"{LAYER_SCALE}{layer}" for layer in count()))
    shown = [job.curves[column].finite() for column in columns]
    if not any(map(len, shown)):
        return None
    figure = new_figure(WIDTH_INCHES, 3.4)
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.9, bottom=0.2, top=0.86)
    ends = []
    for layer, curve in enumerate(shown):
        colour = shades(len(shown))(layer / max(1, len(shown) - 1))
        axes.plot(curve.steps, curve.values, color=colour)
        ends += [(curve.values[-1], f"layer {layer}", colour)] if len(curve) else []
    label_ends(axes, ends if len(ends) <= MOST_COLUMNS else [ends[0], ends[-1]])
    axes.set_title(f"{job.name}: scale by layer", fontweight="bold")
    axes.set_xlabel("step")
    shape_steps(axes)
    return figure


def _labels(gates: Gates) -> list[str]:
    """Experts, or the vectors of a single one."""
    if gates["experts"] > 1:
        return [f"expert {index}" for index in range(gates["experts"])]
    return [f"vector {index}" for index in range(gates["vectors"])]


def _shown_shares(gates: Gates) -> tuple[list[str], Floats]:
    """Weights by layer of experts, or of a single one's vectors; of many the smallest and the largest."""
    labels, shares_LE = _labels(gates), np.array(gates["share_per_layer_and_vector"], dtype=float)
    if len(shares_LE) and gates["experts"] > 1:
        shares_LE = shares_LE.reshape(len(shares_LE), gates["experts"], gates["vectors"]).sum(axis=2)
    if len(labels) <= MOST_COLUMNS:
        return labels, shares_LE
    ends_L2 = np.stack([shares_LE.min(axis=1), shares_LE.max(axis=1)], axis=1) if len(shares_LE) else shares_LE
    return ["smallest weight", "largest weight"], ends_L2


def _mean_rows(rows: Any) -> list[float]:
    return [float(np.mean(row)) for row in rows]


def _cell(values: Any, layer: int, digits: int) -> str | None:
    return fixed(values[layer], digits) if values else None


def _usage(gates: Gates, name: str) -> Figure:
    """Vectors across; layers down on the left, domains on the right, on one scale."""
    layers = np.array(gates["share_per_layer_and_vector"], dtype=float)
    domains = np.array(list(gates["share_per_domain_and_vector"].values()), dtype=float)
    rows = max(len(layers), len(domains))
    height = 1.6 + 0.3 * min(rows, 32)
    figure = new_figure(WIDTH_INCHES, height)
    grid: Any = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.12, right=0.98, wspace=0.4, bottom=0.8 / height, top=1 - 0.5 / height)
    top = float(max(layers.max(), domains.max()))
    labels = [short(breakable(label, " "), LABEL_CHARACTERS) for label in gates["share_per_domain_and_vector"]]
    for axes, shares, names, title in (
        (grid[0], layers, [f"layer {index}" for index in range(len(layers))], f"{name}: by layer"),
        (grid[1], domains, labels, f"{name}: by domain"),
    ):
        axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=top)
        axes.set_title(title, fontweight="bold")
        step = max(1, len(names) // 16)
        axes.set_yticks(range(0, len(names), step), names[::step])
        _mark_experts(axes, gates, shares.shape[1])
        axes.grid(visible=False)
        axes.tick_params(length=0)
    if layers.shape[1] <= WRITTEN_COLUMNS // 2:
        for axes, shares in zip(grid, (layers, domains), strict=True):
            for (row, column), share in np.ndenumerate(shares):
                style = {"ha": "center", "va": "center", "fontsize": 10}
                axes.text(column, row, f"{100 * share:.0f}", color="white" if share > 0.55 * top else INK, **style)
    return figure


def _mark_experts(axes: Any, gates: Gates, width: int) -> None:
    """Ticks at the middle of each expert's vectors, in the expert's colour, and lines between experts."""
    experts, vectors = gates["experts"], gates["vectors"]
    if experts < 2:
        axes.set_xlabel("vector")
        axes.set_xticks(range(0, width, max(1, width // 8)))
        return
    shown = range(0, experts, max(1, experts // 8))
    axes.set_xticks([(index + 0.5) * vectors - 0.5 for index in shown], [f"expert {index}" for index in shown])
    for tick, index in zip(axes.get_xticklabels(), shown, strict=True):
        tick.set_color(letters(colour_of(f"expert-{index}", experts)))
        tick.set_fontweight("bold")
    for index in range(1, experts):
        axes.axvline(index * vectors - 0.5, color="white", linewidth=2)


def _by_layer(gates: Gates, name: str) -> Figure:
    """Three panels: strength, mean length of each expert's vectors, and its scale, over the layers."""
    norms_LE = np.array(gates["norm_per_layer_and_vector"], dtype=float)
    norms_LK = norms_LE.reshape(len(norms_LE), gates["experts"], gates["vectors"]).mean(axis=2)
    panels = {"vector length": norms_LK}
    if gates["strength_per_layer"]:
        panels = {"strength": np.array(gates["strength_per_layer"], dtype=float)[:, None], **panels}
    if gates["scale_per_layer_and_expert"]:
        panels["scale"] = np.array(gates["scale_per_layer_and_expert"], dtype=float)
    figure = new_figure(WIDTH_INCHES, 3.4)
    grid: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.98, wspace=0.28, bottom=0.2, top=0.86)
    for axes, (title, values_LK) in zip(grid, panels.items(), strict=True):
        for index, values_L in enumerate(values_LK.T):
            colour = colour_of(f"expert-{index}", gates["experts"]) if values_LK.shape[1] > 1 else INK
            axes.plot(range(len(values_L)), values_L, color=colour, marker="o", markersize=4)
        if not (values_LK < 0).any():
            axes.set_ylim(bottom=0)
        axes.set_title(f"{name}: {title}", fontweight="bold")
        axes.set_xlabel("layer")
        axes.set_xticks(range(0, len(values_LK), max(1, len(values_LK) // 8)))
    return figure


def _frames(gates: Gates, name: str) -> Figure:
    """A map for each shown layer: time across, vectors down, the darker the heavier."""
    utterance = gates["utterance"]
    height = 0.9 + 1.9 * len(utterance["gates"])
    figure = new_figure(WIDTH_INCHES, height)
    grid: Any = figure.subplots(len(utterance["gates"]), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.12, right=0.98, hspace=0.35, bottom=0.6 / height, top=1 - 0.6 / height)
    for axes, layer, rows in zip(grid, utterance["layers"], utterance["gates"], strict=True):
        gates_ET = np.array(rows, dtype=float)
        extent = (0.0, float(utterance["seconds"]), len(gates_ET) - 0.5, -0.5)
        axes.imshow(gates_ET, aspect="auto", cmap="Blues", vmin=0, extent=extent, interpolation="nearest")
        axes.set_ylabel(f"layer {layer}")
        experts, vectors = gates["experts"], gates["vectors"]
        if experts > 1:
            axes.set_yticks([(index + 0.5) * vectors - 0.5 for index in range(experts)], _labels(gates))
            for index in range(1, experts):
                axes.axhline(index * vectors - 0.5, color=INK, linewidth=0.8)
        axes.grid(visible=False)
    grid[0].set_title(f"{name}: {short(utterance['text'], 60)}", fontweight="bold")
    grid[-1].set_xlabel(f"seconds of {short(utterance['audio'].rpartition(': ')[2].rpartition('/')[2], 60)}")
    return figure
