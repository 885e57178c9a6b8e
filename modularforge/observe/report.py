"""Write the report of a run: its figures as `plots/*.png`, and then `report.html`, which holds the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from matplotlib.figure import Figure

from checkpoints import paths
from checkpoints.parallel import in_order
from checkpoints.urls import UnsafeNameError, checked_part, safe_part
from modularforge.observe.canvas import house_style, png_bytes
from modularforge.observe.completion import headline
from modularforge.observe.curves import curve_figures
from modularforge.observe.discover import short_names
from modularforge.observe.evaluation_figures import evaluation_figure, routing_figures
from modularforge.observe.gates import TITLES as TITLES_OF_GATES
from modularforge.observe.gates import figures_of_run
from modularforge.observe.gradient_figures import TITLES, norm_figures, norms_of_jobs
from modularforge.observe.metrics import CURVE_OF_COLUMN, of_domains
from modularforge.observe.page import Plot, make_page
from modularforge.observe.run import Run, read_run
from modularforge.observe.table import rough
from modularforge.observe.timeline import timeline_figure

PAGE_NAME = "report.html"
PLOTS_FOLDER = "plots"
FIRST_CURVES = (
    "loss",
    "validation_loss",
)  # the page has the others folded: they say how a job runs, not what it learns
WRITES_AT_ONCE = 8  # pictures on their way to an object store while the next is drawn


def write_report(url: str, output: str | None = None) -> tuple[Run, str]:
    """Read a run and write its report there, or to `output`; returns the run and the URL of the page."""
    run, target = read_run(url), output or url

    def write(plot: Plot) -> Plot:
        paths.replace_bytes(paths.join(target, PLOTS_FOLDER, f"{plot.name}.png"), plot.png)
        return plot

    page = make_page(run, in_order(write, draw_run(run), WRITES_AT_ONCE))
    page_url = paths.join(target, PAGE_NAME)
    paths.replace_bytes(page_url, page.encode())
    return run, page_url


def report_runs(urls: list[str], output: str | None = None) -> list[str]:
    """Report several runs; one line of text for each: how far it is, and where its page lies."""
    lines = []
    for url, name in short_names(urls).items():
        target = paths.join(output, *map(_folder, name.split("/"))) if output and len(urls) > 1 else output
        run, page_url = write_report(url, target)
        lines.append(f"{name}: {headline(run)}\n  {page_url}")
    return lines


def _folder(part: str) -> str:
    """One part of a run's name as a folder that lies where it is joined."""
    try:
        return checked_part(part)
    except UnsafeNameError:
        return safe_part(part)


def draw_run(run: Run) -> Iterator[Plot]:
    """Draw everything that the run has data for, in the order of the page."""
    with house_style():
        yield from _plot("timeline", "timeline", "Timeline", "Stages and jobs over time.", timeline_figure(run))
        narrow = curve_figures(run, FIRST_CURVES)
        for column, figure in curve_figures(run).items():
            title = CURVE_OF_COLUMN[column].title.capitalize()
            for plot in _plot(column, "training", title, _last_values(run, column), figure, cut=False):
                stacked = png_bytes(narrow[column], cut=False) if column in narrow else None
                yield replace(plot, narrow=stacked, is_aside=column not in FIRST_CURVES)
        for name, figure in norm_figures(norms_of_jobs(run.norms)):
            text = f"{TITLES[name]}; the numbers are in metrics/gradients of the run."
            yield from _plot(name, "gradients", TITLES[name], text, figure, cut=False)
        what = _sentence(of_domains(run.evaluation or {}).title)
        text = f"{what} of every model on every domain; the table below holds the same numbers."
        yield from _plot("evaluation", "evaluation", f"{what} by model and domain", text, evaluation_figure(run))
        for name, figure in routing_figures(run).items():
            title = f"Routing of the {name.removeprefix('routing_')} model"
            yield from _plot(name, "routing", title, "Share of visits by layer and expert, domain and expert.", figure)
        yield from _gates(run)


def _gates(run: Run) -> Iterator[Plot]:
    for model, name, figure in figures_of_run(run):
        text = f"{TITLES_OF_GATES[name]} of {model}; `modularforge analyze` prints the numbers."
        title = f"{TITLES_OF_GATES[name]}: {model}"
        yield from _plot(f"gates_{model}_{name}", "routing", title, text, figure, cut=False)


def _plot(name: str, section: str, title: str, text: str, figure: Figure | None, cut: bool = True) -> Iterator[Plot]:
    if figure is not None:
        yield Plot(safe_part(name), section, title, text, png_bytes(figure, cut))


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def _last_values(run: Run, column: str) -> str:
    """The last value of each job in words."""
    metric = CURVE_OF_COLUMN[column]
    curves = {name: job.curves[column].finite() for name, job in run.jobs.items() if column in job.curves}
    ends = [f"{name} {rough(curve.values[-1] * metric.factor)}" for name, curve in curves.items() if len(curve)]
    return f"{metric.axis} by step; last values: {', '.join(ends)}."
