"""The end report: wall and GPU time per stage, requeues, work lost and repeated, and goodput; from events and metrics.

Goodput is the share of the nodes' time in which steps were computed that count: metrics hold every such step once,
because a resumed job drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from checkpoints import paths
from checkpoints.parallel import in_order
from launcher.events import READS_AT_ONCE, Event, merge_events, number_in, read_all_events
from launcher.layout import FOLDER
from launcher.record import load_record
from launcher.tasks import Group, build_groups, build_tasks
from modularforge.config import Config
from modularforge.json_lines import objects_in
from modularforge.pipeline import metrics_url


@dataclass
class GroupReport:
    """One stage; times in seconds, summed over jobs and, for `node_seconds`, over nodes."""

    stage: str
    jobs: int = 0
    wall_seconds: float = 0.0
    queue_seconds: float = 0.0
    node_seconds: float = 0.0
    gpu_seconds: float = 0.0
    requeues: int = 0
    lost_steps: int = 0
    goodput: float | None = None


REPORTS = TypeAdapter(list[GroupReport])


def finish_run(config: Config) -> list[GroupReport]:
    """Merge the events, write `cluster/report.json`, print the report and return it."""
    record = load_record(config)
    submitted = record.events() if record else []
    merge_events(config, submitted)
    reports = end_report(config, submitted)
    content = json.dumps([asdict(report) for report in reports], indent=1) + "\n"
    paths.replace_bytes(_report_url(config), content.encode())
    print(describe(reports), flush=True)
    return reports


def kept_report(config: Config, ran: Mapping[str, int]) -> list[GroupReport] | None:
    """The report that a finished run's last job left; None where it knows of fewer jobs of a stage than have run.

    Making it anew reads the metrics of every job.
    """
    try:
        found = REPORTS.validate_json(paths.read_bytes(_report_url(config)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    known = {report.stage: report.jobs for report in found}
    return found if all(known.get(stage, 0) >= count for stage, count in ran.items()) else None


def end_report(config: Config, submitted: list[Event]) -> list[GroupReport]:
    """One row per stage that has run."""
    events, tasks = read_all_events(config), build_tasks(config)
    waiting = {event["job"]: float(event["time"]) for event in reversed(submitted)}
    trained = [task.name for task in tasks if task.is_training and task.name in events]
    seconds = in_order(lambda job: useful_seconds(config, job), trained, READS_AT_ONCE)
    useful = dict(zip(trained, seconds, strict=True))
    rows = (_group_report(group, events, waiting, useful) for group in build_groups(tasks))
    return [row for row in rows if row.jobs]


def describe(reports: list[GroupReport]) -> str:
    """The report as a table."""
    lines = ["stage           jobs      wall    queued  node-time   GPU-time  requeues  lost steps  goodput"]
    for row in reports:
        goodput = "" if row.goodput is None else f"{row.goodput:.0%}"
        lines.append(
            f"{row.stage:<13} {row.jobs:>6} {clock(row.wall_seconds):>9} {clock(row.queue_seconds):>9} "
            f"{clock(row.node_seconds):>10} {clock(row.gpu_seconds):>10} {row.requeues:>9} {row.lost_steps:>11} "
            f"{goodput:>8}"
        )
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _report_url(config: Config) -> str:
    return paths.join(config.output_dir, FOLDER, "report.json")


def _group_report(
    group: Group, events: dict[str, list[Event]], waiting: dict[str, float], seconds: dict[str, float]
) -> GroupReport:
    """`seconds` are those of each job in which steps were computed that count."""
    report, first, last, useful = GroupReport(group.name), float("inf"), 0.0, 0.0
    for task in group.tasks:
        own = events.get(task.name, [])
        spans = sessions(own)
        if not spans:
            continue
        report.jobs += 1
        first, last = min(first, spans[0][0]), max(last, spans[-1][1])
        report.queue_seconds += max(0.0, spans[0][0] - waiting.get(task.name, spans[0][0]))
        nodes = int(next(event for event in own if event["event"] == "started").get("node_count", 1))
        gpus = int(next(event for event in own if event["event"] == "started").get("gpus", 0))
        running = sum(end - start for start, end in spans)
        report.node_seconds += running * nodes
        report.gpu_seconds += running * nodes * gpus
        report.requeues += sum(event["event"] == "requeued" for event in own)
        report.lost_steps += lost_steps(own)
        useful += seconds.get(task.name, 0.0) * nodes
    report.wall_seconds = max(0.0, last - first) if report.jobs else 0.0
    if useful and report.node_seconds:
        report.goodput = min(1.0, useful / report.node_seconds)
    return report


def sessions(events: list[Event]) -> list[tuple[float, float]]:
    """Start and end of each time a job ran; one that ended without a word ended with its last line of metrics."""
    found: list[tuple[float, float]] = []
    start: float | None = None
    for number, event in enumerate(events):
        if event["event"] == "started":
            start = float(event["time"])
        elif start is not None and event["event"] in ("requeued", "ended"):
            end = float(event["time"])
            if event.get("reason") == "by Slurm":
                seen = events[number + 1].get("last_time") if number + 1 < len(events) else None
                end = max(start, float(seen or start))
            found.append((start, end))
            start = None
    return found


def lost_steps(events: list[Event]) -> int:
    """Steps that were computed again, because the job ended after its newest checkpoint."""
    starts = [event for event in events if event["event"] == "started"]
    return sum(max(0, int(event.get("last_step", 0)) - int(event.get("step", 0))) for event in starts)


def useful_seconds(config: Config, job: str) -> float:
    """Time in which the steps in a job's metrics were computed."""
    try:
        content = paths.read_bytes(metrics_url(config, job))
    except (FileNotFoundError, NotADirectoryError):
        return 0.0
    total, tokens = 0.0, 0.0
    for line in objects_in(content)[0]:
        speed, count = number_in(line, "tokens_per_second"), number_in(line, "tokens")
        if speed and count is not None:
            total += (count - tokens) / speed
            tokens = count
    return total
