"""All figures of a run, in the order of the page, as PNG bytes with a title and a text that stands for the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from checkpoints.urls import safe_part
from modularforge.observe.canvas import plain, png_bytes
from modularforge.observe.curve_figures import curve_figures
from modularforge.observe.heatmap_figures import evaluation_figure, routing_figures
from modularforge.observe.metrics import METRICS
from modularforge.observe.run import Run
from modularforge.observe.style import house_style
from modularforge.observe.timeline_figure import timeline_figure

METRIC_OF_COLUMN = {metric.column: metric for metric in METRICS}


@dataclass(frozen=True)
class Plot:
    """One figure: file name without ending, section of the page, title, text instead of the picture, and PNG bytes."""

    name: str
    section: str
    title: str
    text: str
    png: bytes


def draw_run(run: Run) -> Iterator[Plot]:
    """Draw everything that the run has data for."""
    with house_style():
        yield from _plot("timeline", "timeline", "Timeline", "Stages and jobs over time.", timeline_figure(run))
        for column, figure in curve_figures(run).items():
            title = METRIC_OF_COLUMN[column].title.capitalize()
            yield from _plot(column, "training", title, _last_values(run, column), figure, cut=False)
        text = "Perplexity of every model on every domain; the table below holds the same numbers."
        yield from _plot("evaluation", "evaluation", "Perplexity by model and domain", text, evaluation_figure(run))
        for name, figure in routing_figures(run).items():
            title = f"Routing of the {name.removeprefix('routing_')} model"
            yield from _plot(name, "routing", title, "Share of visits by layer and expert, domain and expert.", figure)


def _plot(name: str, section: str, title: str, text: str, figure: Figure | None, cut: bool = True) -> Iterator[Plot]:
    if figure is not None:
        yield Plot(safe_part(name), section, title, text, png_bytes(figure, cut))


def _last_values(run: Run, column: str) -> str:
    """The last value of each job in words."""
    metric = METRIC_OF_COLUMN[column]
    curves = {name: job.curves[column].finite() for name, job in run.jobs.items() if column in job.curves}
    ends = [f"{name} {plain(curve.values[-1] * metric.factor)}" for name, curve in curves.items() if len(curve)]
    return f"{metric.axis} by step; last values: {', '.join(ends)}."
