"""The tables of the page as plain rows: stages and jobs, evaluation, settings, provenance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modularforge.evaluation.findings import chat_rows, sections
from modularforge.evaluation.report import table_rows
from modularforge.observe.canvas import plain
from modularforge.observe.metrics import METRICS, Curve, Metric
from modularforge.observe.progress import Part, duration, parts_of
from modularforge.observe.run import STAGE_OF_JOB, Run, made_with
from modularforge.observe.timeline import commit_time, timeline

JOB_COLUMNS = (
    "loss",
    "validation_loss",
    "validation_perplexity",
    "tokens_per_second",
    "data_wait_share",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class Table:
    """Header and rows of text; all columns but the first `text_columns` hold numbers."""

    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1


def job_table(run: Run) -> Table:
    """One row for each stage and job: state, steps, last values and the time it took."""
    metrics = [metric for metric in METRICS if metric.column in JOB_COLUMNS]
    header = ["part", "state", "step", *(metric.axis for metric in metrics), "time running"]
    jobs = {STAGE_OF_JOB.get(name, name): job for name, job in run.jobs.items()}
    running = {row.name: [s.end - s.start for s in row.spans if s.kind == "running"] for row in timeline(run)}
    rows = []
    for part in parts_of(run):
        curves = jobs[part.name].curves if part.name in jobs else {}
        values = [curves[metric.column].finite() if metric.column in curves else None for metric in metrics]
        cells = [
            _last(metric, curve) if curve is not None and len(curve) else ""
            for metric, curve in zip(metrics, values, strict=True)
        ]
        spent = running.get(part.name)
        rows.append([part.name, _state(part), _steps(part), *cells, duration(sum(spent)) if spent else ""])
    return Table(header, rows, text_columns=2)


def evaluation_table(results: dict[str, Any]) -> Table:
    """The evaluation as in report.md."""
    return Table(*table_rows(results))


def finding_tables(results: dict[str, Any]) -> list[tuple[str, str, Table]]:
    """What else report.md holds the models against, with title and explanation."""
    found = [(title, words, Table(*rows)) for title, words, rows in sections(results)]
    header, replies = chat_rows(results)
    if replies:
        found.append(("Replies to chat prompts", "The likeliest token each time.", Table(header, replies, len(header))))
    return found


def settings_table(config: dict[str, Any]) -> Table:
    """Every setting by its dotted name."""
    return Table(["setting", "value"], [[name, value] for name, value in flatten(config)], text_columns=2)


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
    return Table(["stage", "committed", "fingerprint", "code", "size"], rows, text_columns=4)


def versions_table(run: Run) -> Table:
    """Package versions; where stages were made with different ones, all of them."""
    found: dict[str, dict[str, None]] = {}
    for artifact in run.artifacts.values():
        versions = made_with(artifact).get("versions")
        for package, version in versions.items() if isinstance(versions, dict) else ():
            found.setdefault(package, {})[str(version)] = None
    return Table(["package", "version"], [[name, ", ".join(found[name])] for name in sorted(found)], text_columns=2)


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of nested settings."""
    if isinstance(value, dict):
        inner = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
        return [leaf for name, item in inner for leaf in flatten(item, name)]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for index, item in enumerate(value) for leaf in flatten(item, f"{prefix}.{index}")]
    return [(prefix, "" if value is None else str(value))]


def _last(metric: Metric, curve: Curve) -> str:
    """The last value; losses with four decimals, because hundredths of them matter."""
    value = float(curve.values[-1]) * metric.factor
    return f"{value:.4f}" if metric.unit == "nats per token" else plain(value)


def _state(part: Part) -> str:
    return f"{part.state}, {part.note}" if part.note else part.state


def _steps(part: Part) -> str:
    if not part.step and not part.steps:
        return ""
    return f"{part.step:,} of {part.steps:,}" if part.steps else f"{part.step:,}"
