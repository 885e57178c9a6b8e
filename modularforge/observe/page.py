"""The report as one HTML file that needs nothing else: no script, no network, pictures inside.

`page.html` is the page; whatever it shows is escaped by the template engine, and nothing of a run becomes markup.
"""

from __future__ import annotations

import base64
import datetime
import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, pass_context
from markupsafe import Markup

from checkpoints.redact import redactor
from checkpoints.screen import literal
from modularforge import __version__
from modularforge.observe.figures import Plot
from modularforge.observe.page_style import CSS
from modularforge.observe.progress import headline, is_finished, parts_of
from modularforge.observe.run import Run
from modularforge.observe.tables import (
    evaluation_table,
    finding_tables,
    job_table,
    provenance_table,
    settings_table,
    versions_table,
)

SECTIONS = {
    "progress": "Progress",
    "timeline": "Timeline",
    "training": "Training",
    "evaluation": "Evaluation",
    "routing": "Routing",
    "samples": "Samples",
    "configuration": "Configuration and versions",
}


def make_page(run: Run, plots: Iterable[Plot]) -> str:
    """The whole page."""
    drawn = [{**asdict(plot), "base64": Markup(base64.b64encode(plot.png).decode())} for plot in plots]
    samples = list(_samples(run.evaluation or {}))
    filled = {"progress", *(plot["section"] for plot in drawn)}
    filled |= {"evaluation"} if run.evaluation else set()
    filled |= {"samples"} if samples else set()
    filled |= {"configuration"} if run.artifacts or run.config else set()
    page = _template().render(
        redact=redactor(),
        title=_title(run),
        css=Markup(CSS),
        headline=headline(run),
        tiles=list(_key_figures(run)),
        problems=run.problems,
        url=run.url,
        read_at=f"{datetime.datetime.fromtimestamp(run.read_at, datetime.timezone.utc):%Y-%m-%d %H:%M}",
        version=__version__,
        sections=SECTIONS,
        shown=[name for name in SECTIONS if name in filled],
        plots=drawn,
        share=_share(run),
        jobs=job_table(run),
        evaluation=evaluation_table(run.evaluation) if run.evaluation else None,
        findings=finding_tables(run.evaluation) if run.evaluation else [],
        samples=samples,
        provenance=provenance_table(run) if run.artifacts else None,
        versions=versions_table(run),
        settings=settings_table(run.config) if run.config else None,
    )
    return page.strip() + "\n"


@functools.cache
def _template() -> Template:
    engine = Environment(autoescape=True, undefined=StrictUndefined, finalize=_clean)
    source = resources.files("modularforge.observe") / "page.html"
    return engine.from_string(source.read_text(encoding="utf-8"))


@pass_context
def _clean(context: Any, value: Any) -> Any:
    """What the template shows: text without secrets and control characters; numbers and ready markup as they are."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return literal(context["redact"](value)) if is_text else value


def _title(run: Run) -> str:
    title = str(run.config.get("name", "")) or run.name
    return title if title == run.name else f"{title}: {run.name}"


def _key_figures(run: Run) -> Iterator[tuple[str, str]]:
    """Test perplexity of the chosen model beside what it must beat."""
    results = run.evaluation
    if results and results.get("chosen"):
        for name in dict.fromkeys((results["chosen"], "backbone", "dense")):
            if name in results["models"]:
                yield name, f"{results['models'][name]['perplexity']:,.2f}"


def _share(run: Run) -> float | None:
    """Training tokens done in %; None when the run is finished or its length unknown."""
    parts = [part for part in parts_of(run) if part.tokens]
    total = sum(part.tokens for part in parts)
    if is_finished(run) or not total:
        return None
    return 100 * sum(part.tokens * (part.share or 0.0) for part in parts) / total


def _samples(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    for model, samples in results.get("samples", {}).items():
        for sample in samples:
            for kind in ("greedy", "sampled"):
                yield {"model": model, "kind": kind, "prompt": sample["prompt"], "text": sample[kind]}
