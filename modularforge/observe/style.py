"""How all figures look: colours that colour-blind people tell apart, type that is readable at half size, quiet axes.

An expert has one colour in every figure. Up to eight get hues of their own (Okabe and Ito 2008, extended with two of
Paul Tol's); more get shades along one path from dark to light, ordered by index.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK, GREY, PALE, PAPER = "#1b1b1f", "#6b6f76", "#d9dbdf", "#ffffff"
EXPERT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#332288", "#882255")
RUN_COLOURS = ("#1b1b1f", *EXPERT_COLOURS)
GOOD, BAD = "#0072b2", "#d55e00"
JOB_COLOURS = {
    "backbone": INK,
    "public": INK,
    "dense": GREY,
    "dense_wide": "#9aa0a8",
    "joint": "#6f4e37",
    "joint_evidence": "#b08968",
    "btx": "#7f7f2a",
    "calibration": "#44475a",
}
WIDTH_INCHES, DPI = 11.0, 144
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


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in our style, without a display, and leave the caller's settings as they were."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def colour_of(job: str, num_experts: int) -> Any:
    """The colour of a job, the same in every figure of a run; a branch has that of the expert of its partition."""
    match = re.fullmatch(r"(?:expert|branch)-(\d+)", job)
    if not match:
        return JOB_COLOURS.get(job, GREY)
    index = int(match[1])
    if num_experts <= len(EXPERT_COLOURS):
        return EXPERT_COLOURS[index % len(EXPERT_COLOURS)]
    return shades(num_experts)(index / max(1, num_experts - 1))


@functools.cache
def shades(num_experts: int) -> Any:
    """The path of colours for many experts: viridis without its lightest end, which is faint on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    whole = colormaps["viridis"]
    return ListedColormap([whole(0.88 * index / 255) for index in range(256)], name=f"experts-{num_experts}")
