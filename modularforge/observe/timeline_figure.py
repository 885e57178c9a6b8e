"""The timeline as a figure: waiting pale, running solid, interruptions hatched, requeues and commits as marks."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from modularforge.observe.canvas import new_figure
from modularforge.observe.progress import duration
from modularforge.observe.run import WORKER_NAME, Run
from modularforge.observe.style import BAD, GREY, INK, PALE, WIDTH_INCHES, colour_of
from modularforge.observe.timeline import Row, timeline

LABELLED_ROWS, LABELLED_EVERY = 24, 8
ROW_INCHES, CROWDED_HEIGHT = 0.34, 0.36
UNITS = ((90.0, 1.0, "seconds"), (5400.0, 60.0, "minutes"), (172_800.0, 3600.0, "hours"), (np.inf, 86_400.0, "days"))


def timeline_figure(run: Run) -> Figure | None:
    """Stages and jobs over time; None when no time is known."""
    rows = timeline(run)
    if not rows:
        return None
    start = min([span.start for row in rows for span in row.spans] + [row.committed for row in rows if row.committed])
    end = max([span.end for row in rows for span in row.spans] + [row.committed for row in rows if row.committed])
    _, seconds, unit = next(step for step in UNITS if end - start < step[0])
    is_crowded = len(rows) > LABELLED_ROWS
    heights = [CROWDED_HEIGHT if is_crowded and WORKER_NAME.fullmatch(row.name) else 1.0 for row in rows]
    places = [sum(heights[:place]) + height / 2 for place, height in enumerate(heights)]
    figure = new_figure(WIDTH_INCHES, 1.5 + ROW_INCHES * sum(heights))
    axes: Any = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97)
    for row, place, height in zip(rows, places, heights, strict=True):
        _draw_row(axes, row, place, height, start, seconds, colour_of(row.name, run.num_experts))
    axes.set_ylim(sum(heights), 0)
    axes.set_xlim(left=0, right=max(end - start, 1.0) / seconds * 1.01)
    shown = [place for place, row in enumerate(rows) if not is_crowded or _is_labelled(row)]
    axes.set_yticks([places[i] for i in shown], [rows[i].name for i in shown])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    began = datetime.datetime.fromtimestamp(start, datetime.timezone.utc)
    axes.set_xlabel(f"{unit} since {began:%Y-%m-%d %H:%M} UTC")
    axes.set_title(_title(rows, end - start), fontweight="bold", pad=32)  # the key stands below it
    _add_key(axes, rows)
    return figure


def _draw_row(axes: Any, row: Row, place: float, height: float, start: float, unit: float, colour: Any) -> None:
    for span in row.spans:
        left, width = (span.start - start) / unit, max((span.end - span.start) / unit, 0.0)
        thick, thin = 0.7 * height, 0.34 * height
        if span.kind == "running":
            axes.barh(place, width, left=left, height=thick, color=colour, linewidth=0)
        elif span.kind == "queued":
            axes.barh(place, width, left=left, height=thin, color=PALE, linewidth=0)
        else:
            axes.barh(place, width, left=left, height=thin, color="white", edgecolor=BAD, hatch="////", linewidth=0)
    for moment in row.requeued:
        size = 9 * height**0.5
        axes.plot((moment - start) / unit, place, marker="v", color=BAD, markersize=size, markeredgecolor="white")
    if row.committed is not None:
        style = {"marker": "D", "color": "white", "markeredgecolor": INK, "markeredgewidth": 1.4 * height}
        axes.plot((row.committed - start) / unit, place, markersize=6 * height, clip_on=False, zorder=4, **style)


def _add_key(axes: Any, rows: list[Row]) -> None:
    """Explain only the marks that occur."""
    kinds = {span.kind for row in rows for span in row.spans}
    marks: list[Any] = []
    if "running" in kinds:
        marks.append(Patch(color=GREY, label="running"))
    if "queued" in kinds:
        marks.append(Patch(color=PALE, label="in the queue"))
    if "interrupted" in kinds:
        marks.append(Patch(facecolor="white", edgecolor=BAD, hatch="////", linewidth=0, label="interrupted"))
    if any(row.requeued for row in rows):
        marks.append(Line2D([], [], color=BAD, marker="v", linestyle="", markersize=8, label="requeued"))
    if any(row.committed for row in rows):
        marks.append(Line2D([], [], color="white", marker="D", markeredgecolor=INK, linestyle="", label="committed"))
    style = {"frameon": False, "fontsize": 12, "handletextpad": 0.5, "columnspacing": 1.5, "borderaxespad": 0.2}
    axes.legend(handles=marks, ncols=5, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0.1, **style)


def _title(rows: list[Row], seconds: float) -> str:
    busy = sum(span.end - span.start for row in rows for span in row.spans if span.kind == "running")
    return f"{duration(seconds)} from first to last, {duration(busy)} of work"


def _is_labelled(row: Row) -> bool:
    """Whether a row of a crowded timeline bears its name: of experts and branches one in eight."""
    match = WORKER_NAME.fullmatch(row.name)
    return match is None or int(match[2]) % LABELLED_EVERY == LABELLED_EVERY // 2
