"""The report as one HTML file that needs nothing else, no script, no network, pictures inside, and its tables.

`page.html` is the page; whatever it shows is escaped by the template engine, and nothing of a run becomes markup.
"""

from __future__ import annotations

import base64
import datetime
import functools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, pass_context
from markupsafe import Markup

from checkpoints.redact import redactor
from checkpoints.screen import literal
from modularforge import __version__
from modularforge.observe.cleaning import cleaning_samples, cleaning_tables
from modularforge.observe.completion import Part, headline, is_finished, parts_of
from modularforge.observe.drawn import drawn_table
from modularforge.observe.evaluation import model_table, samples_of, verdict
from modularforge.observe.findings import DECIDING, chat_table, finding_tables, harness_tables, task_tables
from modularforge.observe.metrics import CURVES, JobMetrics, Metric, of_domains
from modularforge.observe.rounds import rounds_table
from modularforge.observe.run import Run, flatten, made_with
from modularforge.observe.table import Column, Table, duration, fixed, listing, rough
from modularforge.observe.timeline import commit_time, timeline

SECTIONS = {
    "progress": "Progress",
    "cleaning": "Cleaning",
    "timeline": "Timeline",
    "training": "Training",
    "gradients": "Gradients",
    "evaluation": "Evaluation",
    "routing": "Routing",
    "samples": "Samples",
    "configuration": "Configuration and versions",
}
FINISHED_ORDER = (
    "evaluation", "samples", "routing", "training", "gradients", "cleaning", "progress", "timeline", "configuration",
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure: file name without ending, section of the page, title, text instead of the picture, and PNG bytes.

    `narrow` is the same for a phone; without it the figure is scrolled there. What is aside is folded at first.
    """

    name: str
    section: str
    title: str
    text: str
    png: bytes
    narrow: bytes | None = None
    is_aside: bool = False


def make_page(run: Run, plots: Iterable[Plot]) -> str:
    """The whole page."""
    drawn = [{**asdict(plot), "png": _base64(plot.png), "narrow": _base64(plot.narrow)} for plot in plots]
    samples = list(samples_of(run.evaluation or {}))
    chat = chat_table(run.evaluation or {})
    filled = {"progress", *(plot["section"] for plot in drawn)}
    filled |= {"evaluation"} if run.evaluation else set()
    filled |= {"samples"} if samples else set()
    filled |= {"cleaning"} if run.cleaning else set()
    filled |= {"configuration"} if run.artifacts or run.config else set()
    page = _template().render(
        redact=redactor(),
        title=_title(run),
        headline=headline(run),
        verdict=verdict(run.evaluation) if run.evaluation else None,
        tiles=list(_key_figures(run)),
        tile_unit=f"test {of_domains(run.evaluation or {}).axis}",
        problems=run.problems,
        url=run.url,
        read_at=f"{datetime.datetime.fromtimestamp(run.read_at, datetime.timezone.utc):%Y-%m-%d %H:%M}",
        version=__version__,
        sections=SECTIONS,
        shown=[name for name in (FINISHED_ORDER if run.evaluation else SECTIONS) if name in filled],
        plots=drawn,
        share=_share(run),
        jobs=job_table(run),
        cleaning=list(cleaning_tables(run.cleaning)),
        cleaned=list(cleaning_samples(run.cleaning)),
        tables=[table for table in (drawn_table(run), rounds_table(run)) if table],
        evaluation=model_table(run.evaluation) if run.evaluation else None,
        findings=_findings(run, chat),
        samples=samples,
        provenance=provenance_table(run) if run.artifacts else None,
        versions=versions_table(run),
        settings=settings_table(run.config) if run.config else None,
    )
    return page.strip() + "\n"


def _base64(png: bytes | None) -> Markup | None:
    return None if png is None else Markup(base64.b64encode(png).decode())


def _findings(run: Run, chat: Table) -> list[Table]:
    """What else the evaluation found."""
    results = run.evaluation
    found = [*finding_tables(results), *task_tables(results), *harness_tables(results)] if results else []
    return [*found, *([chat] if chat.records else [])]


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
    """Test perplexity, or error rate, of the chosen model beside what it must beat."""
    results = run.evaluation
    if results and results.get("chosen"):
        for name in dict.fromkeys((results["chosen"], "backbone", *DECIDING)):
            if name in results["models"]:
                metric = of_domains(results)
                yield name, f"{float(results['models'][name][metric.column]) * metric.factor:,.{metric.digits}f}"


def _share(run: Run) -> float | None:
    """Training tokens done in %; None when the run is finished or its length unknown."""
    parts = [part for part in parts_of(run) if part.tokens]
    total = sum(part.tokens for part in parts)
    if is_finished(run) or not total:
        return None
    return 100 * sum(part.tokens * (part.share or 0.0) for part in parts) / total


def job_table(run: Run) -> Table:
    """One record for each stage and job: state, steps, last values and the time it took."""
    spent = {row.name: sum(s.end - s.start for s in row.spans if s.kind == "running") for row in timeline(run)}
    shown = [metric for metric in CURVES if metric.in_table]
    columns = [
        Column("part", lambda part: part.name, is_text=True),
        Column("state", _state, is_text=True),
        Column("step", _steps),
        *(Column(metric.axis, functools.partial(_last, metric, run.jobs)) for metric in shown),
        Column("time running", lambda part: duration(spent[part.name]) if spent.get(part.name) else ""),
    ]
    return Table(columns, parts_of(run))


def settings_table(config: dict[str, Any]) -> Table:
    """Every setting by its dotted name."""
    return listing(["setting", "value"], flatten(config), 2)


def provenance_table(run: Run) -> Table:
    """What each stage was made with."""
    rows = []
    for name, artifact in sorted(run.artifacts.items(), key=lambda item: commit_time(item[1]) or 0.0):
        manifest = artifact.manifest
        made = made_with(artifact)
        commit = str(made.get("commit") or "not in git")[:10]
        changed = " and uncommitted changes" if made.get("uncommitted_sha256") else ""
        size = f"{manifest.size / 1e6:,.1f} MB"
        rows.append([name, manifest.created, manifest.fingerprint[:12], commit + changed, size])
    return listing(["stage", "committed", "fingerprint", "code", "size"], rows, 4)


def versions_table(run: Run) -> Table:
    """Package versions; where stages were made with different ones, all of them."""
    found: dict[str, dict[str, None]] = {}
    for artifact in run.artifacts.values():
        versions = made_with(artifact).get("versions")
        for package, version in versions.items() if isinstance(versions, dict) else ():
            found.setdefault(package, {})[str(version)] = None
    return listing(["package", "version"], [(name, ", ".join(found[name])) for name in sorted(found)], 2)


def _last(metric: Metric, jobs: dict[str, JobMetrics], part: Part) -> str:
    """The last value of a part's job; losses with four decimals, because hundredths of them matter."""
    curve = jobs[part.name].curves.get(metric.column) if part.name in jobs else None
    if curve is None or not len(curve.finite()):
        return ""
    value = float(curve.finite().values[-1]) * metric.factor
    return fixed(value) if metric.unit == "nats per token" else rough(value)


def _state(part: Part) -> str:
    return f"{part.state}, {part.note}" if part.note else part.state


def _steps(part: Part) -> str:
    if not part.step and not part.steps:
        return ""
    return f"{part.step:,} of {part.steps:,}" if part.steps else f"{part.step:,}"
