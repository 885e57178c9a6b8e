"""When each stage and job waited, ran, was cut off and ended, and the figure of it.

Three sources, the best first: `jobs.jsonl`, where the launcher notes what it submitted and requeued; the times in the
metrics, where a pause far longer than the tokens in it took is an interruption; the commit times of the manifests.
In the figure waiting is pale, running solid, interruptions are hatched, requeues and commits are marks.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from checkpoints import Artifact
from modularforge.json_lines import moment
from modularforge.observe.canvas import BAD, GREY, INK, PALE, WIDTH_INCHES, colour_of, new_figure
from modularforge.observe.metrics import JobMetrics
from modularforge.observe.run import WORKER_NAME, Run, job_order
from modularforge.observe.table import duration
from modularforge.pipeline import OLD_NAMES

Kind = Literal["queued", "running", "interrupted"]
# A pause that is an interruption: longer than a validation or a checkpoint takes, and than its steps may have varied.
PAUSE_SECONDS = 60.0
PAUSE_RATIO = 4.0
LONGEST_LINE_SECONDS = 1e7  # of one line of metrics; more is a wrong number
LABELLED_ROWS, LABELLED_EVERY = 24, 8
ROW_INCHES, CROWDED_HEIGHT = 0.34, 0.36
UNITS = ((90.0, 1.0, "seconds"), (5400.0, 60.0, "minutes"), (172_800.0, 3600.0, "hours"), (np.inf, 86_400.0, "days"))


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
        row = rows.setdefault(name, Row(name))
        if row.committed is not None and job.last_time is not None:
            row.committed = max(row.committed, job.last_time)  # manifests tell whole seconds, rounded down
        row.spans = spans_of_metrics(job, row.committed)
    for name, records in _by_row(run.records).items():
        row = rows.setdefault(name, Row(name))
        row.spans, row.requeued = spans_of_records(records, run.read_at)
    return sorted((row for row in rows.values() if row.spans or row.committed), key=lambda row: job_order(row.name))


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
    if name == "evaluate" and run.evaluation:
        seconds = run.evaluation.get("seconds")
    if (seconds := moment(seconds)) is not None and row.committed is not None:
        row.spans = [Span("running", max(0.0, row.committed - seconds), row.committed)]
    return row


def _by_row(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        name = str(record["job"])
        rows.setdefault(OLD_NAMES.get(name, name), []).append(record)
    return rows


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
    for time in row.requeued:
        size = 9 * height**0.5
        axes.plot((time - start) / unit, place, marker="v", color=BAD, markersize=size, markeredgecolor="white")
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
