"""The table of a study as a dot plot: one line a variant, a dot at its mean, small marks for the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modularforge.observe.canvas import new_figure, png_bytes
from modularforge.observe.style import EXPERT_COLOURS, GREY, INK, PALE, WIDTH_INCHES, house_style

LINE_INCHES, MARGINS_INCHES = 0.3, 1.3
LANDMARKS = ("backbone", "dense", "joint")
COLOURS = {
    "assembled": EXPERT_COLOURS[0],
    **dict.fromkeys(("btx", "btx_trained"), EXPERT_COLOURS[3]),
    **dict.fromkeys(("joint", "joint_evidence"), EXPERT_COLOURS[4]),
    "experts": EXPERT_COLOURS[2],
}
MARKERS = {"assembled": "o", "btx": "^", "btx_trained": "^", "joint": "D", "joint_evidence": "d", "experts": "v"}


def draw_table(table: Mapping[str, Any]) -> bytes:
    """PNG of all rows, the best at the top; dashed lines show the backbone, the dense and the joint model."""
    rows = sorted(table["rows"].items(), key=lambda item: float(item[1]["mean_loss"]), reverse=True)
    with house_style():
        height = MARGINS_INCHES + LINE_INCHES * len(rows)
        figure = new_figure(WIDTH_INCHES, height)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.34, right=0.93, top=1 - 0.7 / height, bottom=0.6 / height)
        for place, (_, row) in enumerate(rows):
            _draw_row(axes, place, row)
        _draw_landmarks(axes, rows)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(-0.8, len(rows) - 0.2)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=PALE)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.set_xlabel(f"mean {table['split']} loss (nats per token; lower is better)")
        return png_bytes(figure)


def _draw_row(axes: Any, place: int, row: Mapping[str, Any]) -> None:
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
    for height, kind in enumerate(LANDMARKS):
        found = next((row for _, row in reversed(rows) if row["kind"] == kind), None)
        if found:
            place = (found["mean_loss"], 1)
            axes.axvline(found["mean_loss"], color=GREY, linewidth=1.1, linestyle=(0, (3, 3)), zorder=0)
            axes.annotate(kind, place, (0, 3 + 14 * height), ("data", "axes fraction"), "offset points", **style)
