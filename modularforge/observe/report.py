"""Write the report of a run: `plots/*.png` and then `report.html`, which holds the same pictures."""

from __future__ import annotations

from checkpoints import paths
from checkpoints.parallel import in_order
from checkpoints.urls import UnsafeNameError, checked_part, safe_part
from modularforge.observe.discover import short_names
from modularforge.observe.figures import Plot, draw_run
from modularforge.observe.page import make_page
from modularforge.observe.progress import headline
from modularforge.observe.run import Run, read_run

PAGE_NAME = "report.html"
PLOTS_FOLDER = "plots"
WRITES_AT_ONCE = 8


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
