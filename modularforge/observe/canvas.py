"""How all figures look and what every one needs: colours, type, labels that do not overlap, axes, and PNG bytes.

Colours are such that colour-blind people tell them apart, type is readable at half size, axes are quiet. An expert has
one colour in every figure. Up to eight get hues of their own (Okabe and Ito 2008, extended with two of Paul Tol's);
more get shades along one path from dark to light, ordered by index.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from modularforge.observe.metrics import Metric
from modularforge.observe.table import rough
from modularforge.pipeline import STAGES

INK, GREY, PALE, PAPER = "#1b1b1f", "#6b6f76", "#d9dbdf", "#ffffff"
EXPERT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#332288", "#882255")
RUN_COLOURS = ("#1b1b1f", *EXPERT_COLOURS)
BAD = "#d55e00"
READABLE_LUMINANCE = 1.05 / 4.5 - 0.05  # beside white
JOB_COLOURS = {
    "public": INK,
    **{word: row.colour for row in STAGES.values() if row.colour for word in (row.name, row.kind)},
}
WIDTH_INCHES, DPI = 11.0, 144
NARROW_INCHES = 5.5  # at 390 pixels, type of 13 points is 12 pixels high
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "text.parse_math": False,  # a run or a domain may be called `$x_$`
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "savefig.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "path.simplify": True,
    "agg.path.chunksize": 20_000,
}
LABEL_HEIGHT_POINTS = 14.0
MOST_INCHES = 400.0  # of 144 points each; a picture cannot have more than 65,536


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in our style, without a display, and leave the caller's settings as they were."""
    with matplotlib.rc_context(SETTINGS):
        yield


def colour_of(job: str, num_experts: int) -> Any:
    """The colour of a job, the same in every figure of a run; branches and rounds have that of the expert."""
    match = re.fullmatch(r"(?:expert|branch|round_\d+)-(\d+)", job)
    if not match:
        return JOB_COLOURS.get(job, GREY)
    index = int(match[1])
    if num_experts <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
    return shades(num_experts)(index / max(1, num_experts - 1))


def letters(colour: Any) -> tuple[float, float, float]:
    """A colour dark enough to be read on white, at 4.5 to 1 (WCAG 2.2, 1.4.3); turned to a dark page's it is so too."""
    red, green, blue = to_rgb(colour)
    while luminance((red, green, blue)) > READABLE_LUMINANCE:
        red, green, blue = 0.97 * red, 0.97 * green, 0.97 * blue
    return red, green, blue


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of red, green and blue from 0 to 1 (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@functools.cache
def shades(num_experts: int) -> Any:
    """The path of colours for many experts: viridis without its lightest end, which is faint on white."""
    whole = colormaps["viridis"]
    return ListedColormap([whole(0.88 * index / 255) for index in range(256)], name=f"experts-{num_experts}")


def new_figure(width: float, height: float) -> Figure:
    """A figure that only files will show; nothing global keeps it alive."""
    figure = Figure(figsize=(width, min(height, MOST_INCHES)), layout=None)
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure, cut: bool = True) -> bytes:
    """The figure as a PNG; `cut` keeps its width and fits its height to what is drawn."""
    buffer, box = io.BytesIO(), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks is shown as boxes
        if cut:
            drawn = figure.get_tightbbox(figure.canvas.get_renderer())  # type: ignore[attr-defined]
            width = figure.get_size_inches()[0]
            box = Bbox.from_extents(min(0.0, drawn.x0), drawn.y0 - 0.1, max(width, drawn.x1), drawn.y1 + 0.1)
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches=box, metadata={"Software": None})
    return buffer.getvalue()


def label_ends(axes: Any, labels: Sequence[tuple[float, str, Any]], size: float = 12) -> None:
    """Write labels (height in data, text, colour) right of the axes, moved apart until none covers another."""
    inside = [label for label in labels if np.isfinite(label[0])]
    if not inside:
        return
    axes.autoscale_view()
    box = axes.get_window_extent()
    pixel = axes.figure.dpi / 72
    heights = [axes.transData.transform((axes.get_xlim()[1], label[0]))[1] for label in inside]
    gap = LABEL_HEIGHT_POINTS * pixel * size / 12
    places = spread(heights, gap, box.y0 + gap / 2, box.y1)  # the numbers of the steps stand below
    for (_, text, colour), place in zip(inside, places, strict=True):
        height = (place - box.y0) / box.height
        style = {
            "color": letters(colour),
            "fontsize": size,
            "fontweight": "bold",
            "va": "center",
            "annotation_clip": False,
        }
        axes.annotate(text, (1, height), (8, 0), "axes fraction", "offset points", **style)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed so that neighbours are `gap` apart; order is kept."""
    order = np.argsort(places, kind="stable")
    blocks: list[list[float]] = []  # centre and count of labels that touch
    for index in order:
        blocks.append([float(np.clip(places[index], low, high)), 1])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            (centre, count), (below, number) = blocks.pop(), blocks.pop()
            middle = (centre * count + below * number) / (count + number)
            blocks.append([max(middle, low + gap * (count + number - 1) / 2), count + number])
    found = [centre + gap * (index - (count - 1) / 2) for centre, count in blocks for index in range(int(count))]
    result = [0.0] * len(places)
    for index, place in zip(order, found, strict=True):
        result[index] = place
    return result


def shape_axis(axes: Any, metric: Metric) -> None:
    """Scale and ticks of the value axis as the metric wants them."""
    if metric.scale == "log":
        axes.set_yscale("log", nonpositive="mask")  # a zero would lie a thousand decades below
        low, high = axes.get_ylim()
        many = high / max(low, 1e-300) > 30
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=8))
        if high / max(low, 1e-300) < 2.5:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rough(value)))
    elif metric.scale == "from_zero":
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def shape_steps(axes: Any) -> None:
    """As many whole step numbers as fit side by side, with k and M for thousands and millions."""
    inches = axes.get_position().width * axes.figure.get_size_inches()[0]
    digits = len(f"{axes.get_xlim()[1]:.0f}")
    axes.xaxis.set_major_locator(
        MaxNLocator(max(2, min(8, int(inches / (0.16 * min(digits, 4) + 0.16)))), integer=True)
    )
    if digits > 4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
