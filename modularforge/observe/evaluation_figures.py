"""Figures of what was measured: routing and perplexity as heat maps, and the rows of a study as a dot plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from checkpoints.screen import breakable, short
from modularforge.observe.canvas import (
    EXPERT_COLOURS,
    GREY,
    INK,
    PALE,
    PAPER,
    WIDTH_INCHES,
    colour_of,
    house_style,
    letters,
    luminance,
    new_figure,
    png_bytes,
)
from modularforge.observe.metrics import Floats, is_speech, of_domains
from modularforge.observe.run import Run, kind_of
from modularforge.observe.table import rough

# As many as have room in a figure of our width: columns with numbers in them, of two maps beside each other, and rows.
WRITTEN_COLUMNS = 16
COLUMNS_SIDE_BY_SIDE = 9
SHOWN_EXPERTS = 12
# Longer names would lie upon each other; the table has them whole. Of a row's name, and of all columns' together, which
# are smaller where there are many of them.
LABEL_CHARACTERS, HEADER_CHARACTERS, SMALL_HEADER_CHARACTERS, LARGE_HEADERS = 15, 72, 96, 7
LINE_INCHES, MARGINS_INCHES = 0.3, 1.3
LANDMARKS = ("backbone", "dense", "joint", "joint_lora")
COLOURS = {
    "assembled": EXPERT_COLOURS[0],
    **dict.fromkeys(("btx", "btx_trained"), EXPERT_COLOURS[3]),
    **dict.fromkeys(("joint", "joint_evidence", "joint_lora", "joint_lora_wide"), EXPERT_COLOURS[4]),
    "experts": EXPERT_COLOURS[2],
}
MARKERS = {
    "assembled": "o",
    **dict.fromkeys(("btx", "btx_trained"), "^"),
    **dict.fromkeys(("joint", "joint_lora_wide"), "D"),
    **dict.fromkeys(("joint_evidence", "joint_lora"), "d"),
    "experts": "v",
}


def routing_figures(run: Run) -> dict[str, Figure]:
    """For every measured model with routers: layer by expert, and domain by expert, side by side."""
    routing: dict[str, Any] = (run.evaluation or {}).get("routing", {})
    return {f"routing_{model}": _draw_routing(run, model, values) for model, values in routing.items()}


def _draw_routing(run: Run, model: str, values: dict[str, Any]) -> Figure:
    layers = np.array(values["share_per_layer_and_expert"], dtype=float)
    domains = values["share_per_domain_and_expert"]
    by_domain = np.array(list(domains.values()), dtype=float)
    experts = values.get("experts") or [str(index) for index in range(layers.shape[1])]
    wide = layers.shape[1] > COLUMNS_SIDE_BY_SIDE
    rows = (len(layers), len(by_domain))
    height = 1.7 + 0.42 * (sum(rows) + 3 if wide else max(rows))
    figure = new_figure(WIDTH_INCHES, height)
    shape = {"height_ratios": rows, "hspace": 3.4 / (sum(rows) / 2 + 1)} if wide else {"wspace": 0.46}
    grid: Any = figure.subplots(*((2, 1) if wide else (1, 2)), gridspec_kw=shape)
    top = float(max(layers.max(), by_domain.max()))
    for axes, shares, names, title in (
        (grid[0], layers, [f"layer {index}" for index in range(len(layers))], f"{model}: visits by layer"),
        (grid[1], by_domain, list(domains), f"{model}: visits by domain"),
    ):
        _draw_shares(axes, shares, top, names, experts, run.num_experts)
        axes.set_title(title, fontweight="bold")
    even = 100 / layers.shape[1]
    _caption(
        grid[-1] if wide else grid[0],
        56,
        f"Share of visits in %; even routing is {even:.3g} % everywhere, the strongest colour {100 * top:.0f} %.",
    )
    return figure


def _draw_shares(axes: Any, shares: Floats, top: float, names: list[str], experts: list[str], count: int) -> None:
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    written = shares.shape[1] <= WRITTEN_COLUMNS
    every = 1 if written else 8
    labels = [name.removeprefix("expert-") for name in experts]
    shown = [i for i in range(len(experts)) if i == 0 or written or _number(labels[i], i) % every == every - 1]
    axes.set_xticks(shown, [labels[index] for index in shown])
    axes.set_xlabel("expert")
    for tick, index in zip(axes.get_xticklabels(), shown, strict=True):
        tick.set_color(letters(colour_of(experts[index], count)))
        tick.set_fontweight("bold")
    axes.set_yticks(range(len(names)), [short(breakable(name, " "), LABEL_CHARACTERS) for name in names])
    if written:
        for (row, column), share in np.ndenumerate(shares):
            colour = PAPER if share > 0.55 * top else INK
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=12, color=colour)
    _no_frame(axes)


def evaluation_figure(run: Run) -> Figure | None:
    """Perplexity or error rate of every model on every domain, coloured by its distance from the backbone's."""
    results = run.evaluation
    if not results or "backbone" not in results["models"]:
        return None
    names = _shown_models(results)
    domains = list(results["domains"])
    shown, change = _rates(results, names) if is_speech(results) else _perplexities(results, names)
    figure = new_figure(WIDTH_INCHES, 1.4 + 0.42 * len(names))
    axes: Any = figure.subplots()
    reach = _reach(change, names)
    image = axes.imshow(change, aspect="auto", cmap="PuOr_r", norm=TwoSlopeNorm(0, -reach, reach))
    for (row, column), percent in np.ndenumerate(change):
        colour = PAPER if _is_dark(image.to_rgba(percent)) else INK
        weight = "bold" if column == len(domains) else "normal"
        value = _written(float(shown[row, column]))
        axes.text(column, row, value, ha="center", va="center", color=colour, fontweight=weight)
    _name_columns(axes, domains)
    axes.set_yticks(range(len(names)), names)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_color(letters(colour_of(name, run.num_experts)) if kind_of(name) == "expert" else INK)
        tick.set_fontweight("bold" if kind_of(name) == "expert" or name == results.get("chosen") else "normal")
    _no_frame(axes)
    what = f"Test {of_domains(results).axis}, lower is better."
    unit = "points" if is_speech(results) else "%"
    _caption(axes, 14, f"{what} Purple: better than the backbone, orange: worse; strongest from {reach:.0f} {unit} on.")
    return figure


def _perplexities(results: dict[str, Any], names: list[str]) -> tuple[Floats, Floats]:
    """Perplexities of models on domains and in the mean, and their distance from the backbone's in %."""
    losses = np.array([[*(_loss(results, name, label) for label in results["domains"]), _mean(results, name)]
                       for name in names])  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged model's loss may be infinite
        return np.exp(losses), 100 * np.expm1(losses - losses[names.index("backbone")])


def _rates(results: dict[str, Any], names: list[str]) -> tuple[Floats, Floats]:
    """Error rates in % of models on domains and in the mean, and their distance from the backbone's in points."""
    column, models = of_domains(results).column, results["models"]
    rows = [[models[name]["domains"][label] for label in results["domains"]] + [models[name]] for name in names]
    rates = 100 * np.array([[float(cell[column]) for cell in row] for row in rows])
    with np.errstate(invalid="ignore"):  # nothing was said, and something written
        return rates, rates - rates[names.index("backbone")]


def _reach(change: Floats, names: list[str]) -> float:
    """The change in % at which colours are strongest: that of whole models, beside which single experts are far off."""
    whole = [kind_of(name) != "expert" for name in names]
    shown = change[whole]
    return float(max(1.0, np.max(np.abs(shown[np.isfinite(shown)]), initial=0.0)))


def _is_dark(colour: Sequence[float]) -> bool:
    """Whether white text has more contrast on a colour than black."""
    return luminance(colour) < 0.18


def _written(perplexity: float) -> str:
    """As many digits as tell models apart that differ by half a percent."""
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:.1f}" if perplexity < 1000 else rough(perplexity)


def _name_columns(axes: Any, domains: list[str]) -> None:
    count = len(domains) + 1
    is_large = count <= LARGE_HEADERS
    characters = max(4, (HEADER_CHARACTERS if is_large else SMALL_HEADER_CHARACTERS) // count)
    labels = [*(_two_lines(label, characters) for label in domains), "all domains\nalike"]
    axes.set_xticks(range(count), labels, fontsize=None if is_large else 9.5)
    axes.xaxis.tick_top()


def _two_lines(label: str, characters: int) -> str:
    first, *rest = breakable(label, "\n").split("\n")
    return "\n".join(short(line, characters) for line in (first, " ".join(rest)) if line)


def _number(label: str, place: int) -> int:
    """The index of an expert by its label, or else by its place."""
    return int(label) if label.isascii() and label.isdigit() else place


def _shown_models(results: dict[str, Any]) -> list[str]:
    names = list(results["models"])
    crowded = sum(kind_of(name) == "expert" for name in names) > SHOWN_EXPERTS
    return [name for name in names if not (crowded and kind_of(name) == "expert")]


def _loss(results: dict[str, Any], model: str, label: str) -> float:
    return float(results["models"][model]["domains"][label]["loss"])


def _mean(results: dict[str, Any], model: str) -> float:
    return float(results["models"][model]["mean_loss"])


def _caption(axes: Any, points_below: float, text: str) -> None:
    axes.annotate(
        text, (0, 0), (0, -points_below), "axes fraction", "offset points", va="top", fontsize=12, annotation_clip=False
    )


def _no_frame(axes: Any) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([place - 0.5 for place in range(1, int(axes.get_xlim()[1] + 0.5))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, int(axes.get_ylim()[0] + 0.5))], minor=True)
    axes.grid(visible=True, which="minor", axis="both", color=PAPER, linewidth=2)
    axes.tick_params(which="minor", length=0)


def draw_study(table: Mapping[str, Any]) -> bytes:
    """PNG of all rows of a study, the best at the top: a dot at the mean, small marks for the seeds.

    Dashed lines show the backbone, the dense and the joint model, and the joint adapter of LoRA experts.
    """
    rows = sorted(table["rows"].items(), key=lambda item: float(item[1]["mean_loss"]), reverse=True)
    with house_style():
        height = MARGINS_INCHES + LINE_INCHES * len(rows)
        figure = new_figure(WIDTH_INCHES, height)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.34, right=0.93, top=1 - 0.7 / height, bottom=0.6 / height)
        for place, (_, row) in enumerate(rows):
            _draw_variant(axes, place, row)
        _draw_landmarks(axes, rows)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(-0.8, len(rows) - 0.2)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=PALE)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.set_xlabel(f"mean {table['split']} loss (nats per token; lower is better)")
        return png_bytes(figure)


def _draw_variant(axes: Any, place: int, row: Mapping[str, Any]) -> None:
    colour, marker = COLOURS.get(row["kind"], GREY), MARKERS.get(row["kind"], "s")
    losses = list(row["losses"].values())
    if len(losses) > 1:
        axes.plot([min(losses), max(losses)], [place, place], color=colour, linewidth=1.4, alpha=0.6)
        axes.plot(losses, [place] * len(losses), "|", color=colour, markersize=8)
    axes.plot([row["mean_loss"]], [place], marker, color=colour, markersize=7)
    style: dict[str, Any] = {"va": "center", "fontsize": 11, "color": INK, "annotation_clip": False}
    axes.annotate(f"{row['mean_loss']:.3f}", (1, place), (8, 0), ("axes fraction", "data"), "offset points", **style)


def _draw_landmarks(axes: Any, rows: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Lines at the landmarks; their names stand at heights of their own, because the lines may be close together."""
    style: dict[str, Any] = {"ha": "center", "fontsize": 11, "color": GREY}
    best = {row["kind"]: row for _, row in rows}
    for height, kind in enumerate(kind for kind in LANDMARKS if kind in best):
        loss = best[kind]["mean_loss"]
        axes.axvline(loss, color=GREY, linewidth=1.1, linestyle=(0, (3, 3)), zorder=0)
        axes.annotate(kind, (loss, 1), (0, 3 + 12 * height), ("data", "axes fraction"), "offset points", **style)
