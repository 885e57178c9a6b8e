"""When each stage and job waited, ran, was cut off and ended.

Three sources, the best first: `jobs.jsonl`, where the launcher notes what it submitted and requeued; the times in the
metrics, where a pause far longer than the tokens in it took is an interruption; the commit times of the manifests.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from checkpoints import Artifact
from modularforge.observe.metrics import JobMetrics, moment
from modularforge.observe.run import JOB_ORDER, STAGE_OF_JOB, Run, job_order

Kind = Literal["queued", "running", "interrupted"]
# The launcher's names of jobs that make several stages, by the row that shows them.
ROW_OF_RECORD = {"prepare-data": "corpus", "assemble": "assembled", "calibrate": "calibrated", "evaluate": "evaluation"}
PAUSE_SECONDS = 60.0
PAUSE_RATIO = 4.0
LONGEST_LINE_SECONDS = 1e7


@dataclass(frozen=True)
class Span:
    """A stretch of one row; times in seconds since 1970."""

    kind: Kind
    start: float
    end: float


@dataclass
class Row:
    """One stage or job: its spans, and the moments of requeues and of the commit."""

    name: str
    spans: list[Span] = field(default_factory=list)
    requeued: list[float] = field(default_factory=list)
    committed: float | None = None


def timeline(run: Run) -> list[Row]:
    """Rows with at least one known time, in the order of the pipeline."""
    rows: dict[str, Row] = {}
    for name, artifact in run.artifacts.items():
        rows[name] = _row_of_artifact(name, artifact, run)
    for name, job in run.jobs.items():
        row = rows.setdefault(STAGE_OF_JOB.get(name, name), Row(STAGE_OF_JOB.get(name, name)))
        if row.committed is not None and job.last_time is not None:
            row.committed = max(row.committed, job.last_time)  # manifests tell whole seconds, rounded down
        row.spans = spans_of_metrics(job, row.committed)
    for name, records in _by_row(run.records).items():
        row = rows.setdefault(name, Row(name))
        row.spans, row.requeued = spans_of_records(records, run.read_at)
    return sorted((row for row in rows.values() if row.spans or row.committed), key=lambda row: _place(row.name))


def spans_of_metrics(job: JobMetrics, committed: float | None = None) -> list[Span]:
    """Running and interrupted stretches of a job, from the time and speed of its metric lines."""
    if not len(job.times):
        return []
    times, seconds = job.times.values, _seconds_before_lines(job)
    spans, start = [], float(times[0] - seconds[0])
    for index in range(1, len(times)):
        pause = times[index] - times[index - 1] - seconds[index]
        if pause > max(PAUSE_SECONDS, PAUSE_RATIO * seconds[index]):
            stopped, resumed = float(times[index - 1]), float(times[index] - seconds[index])
            spans += [Span("running", start, stopped), Span("interrupted", stopped, resumed)]
            start = resumed
    end = max(float(times[-1]), job.last_time or 0.0)
    # What comes between the last line and the commit is statistics and saving, unless it took far too long.
    if committed is not None and end < committed < end + PAUSE_SECONDS:
        end = committed
    return [*spans, Span("running", start, end)]


def spans_of_records(records: list[dict[str, Any]], now: float) -> tuple[list[Span], list[float]]:
    """Queued and running stretches of a job, and when it was requeued; what is still going on ends now."""
    spans: list[Span] = []
    requeued: list[float] = []
    kind: Kind | None = None
    since = 0.0
    following: dict[str, Kind | None] = {
        "submitted": "queued", "started": "running", "requeued": "queued", "ended": None
    }  # fmt: skip
    for record in sorted(records, key=lambda record: float(record["time"])):
        time, event = float(record["time"]), record["event"]
        if event not in following:
            continue
        if kind is not None:
            spans.append(Span(kind, since, time))
        if event == "requeued":
            requeued.append(time)
        kind, since = following[event], time
    if kind is not None:
        spans.append(Span(kind, since, max(now, since)))
    return spans, requeued


def commit_time(artifact: Artifact) -> float | None:
    """When a manifest was written, in seconds since 1970."""
    try:
        return datetime.datetime.fromisoformat(artifact.manifest.created).timestamp()
    except (ValueError, OverflowError):
        return None


def _seconds_before_lines(job: JobMetrics) -> Any:
    """Seconds that the steps before each line took: their tokens over the line's speed."""
    steps = job.times.steps
    tokens, speed = job.curves.get("tokens"), job.curves.get("tokens_per_second")
    if tokens is None or speed is None or len(tokens) != len(steps) or len(speed) != len(steps):
        return np.zeros(len(steps))
    new_tokens = np.diff(tokens.values, prepend=0.0)
    seconds = new_tokens / np.maximum(speed.values, 1e-9)
    return np.clip(np.nan_to_num(seconds, nan=0.0), 0.0, np.minimum(LONGEST_LINE_SECONDS, job.times.values))


def _row_of_artifact(name: str, artifact: Artifact, run: Run) -> Row:
    row = Row(name, committed=commit_time(artifact))
    seconds = artifact.manifest.facts.get("seconds")
    if name == "evaluation" and run.evaluation:
        seconds = run.evaluation.get("seconds")
    if (seconds := moment(seconds)) is not None and row.committed is not None:
        row.spans = [Span("running", max(0.0, row.committed - seconds), row.committed)]
    return row


def _by_row(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = str(record["job"])
        rows.setdefault(ROW_OF_RECORD.get(name, STAGE_OF_JOB.get(name, name)), []).append(record)
    return rows


def _place(name: str) -> tuple[float, int, str]:
    """Order of the rows."""
    end = JOB_ORDER["calibration"]
    fixed = {"corpus": -2, "partitions": -1, "assembled": end - 0.7, "calibrated": end - 0.4, "evaluation": end - 0.1}
    first, second, third = job_order(name)
    return fixed.get(name, first), second, third
