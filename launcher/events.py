"""What is known of each job: what happened to it, and how far its training is.

What happened are JSON lines {job, event, time, …}: submitted, started, requeued, ended. Every job has notes of its own,
because appending from many nodes to one file loses lines; `merge_events` makes the one file that reports read.
How far it is says the store: the newest checkpoint and the last line of metrics. Times are seconds since 1970.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import Required, TypedDict

from checkpoints import find_artifact, paths
from checkpoints.labels import Label
from checkpoints.notes import add_line, read_folder, read_lines
from checkpoints.parallel import in_order
from checkpoints.redact import redact_values
from checkpoints.urls import MANIFEST_NAME
from launcher.layout import all_events_url, events_url
from modularforge.config import Config
from modularforge.json_lines import objects_in
from modularforge.pipeline import checkpoint_url, metrics_url

Event = dict[str, Any]
Seconds = Annotated[float, Field(ge=0, lt=1e11)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Noted(TypedDict, total=False):
    """An event as it is read: what other code counts with has the kind that it wants."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]
    job: Required[str]
    event: Required[str]
    time: Required[Seconds]
    slurm_job: str | None
    key: str
    log: str
    reason: str
    code: int
    restarts: Count
    nodes: str
    node_count: Count
    gpus: Count
    step: Count
    last_step: Count
    last_time: Seconds | None


NOTED = TypeAdapter(Noted)
READS_AT_ONCE = 16
JOBS_OF_A_LISTING = 100  # whose checkpoints fill a page, or nearly
STEP_NAME = re.compile(r"step-(\d{8,})")
# Holds many lines of metrics, so that one torn at the end leaves others; all of them would be megabytes.
TAIL_BYTES = 8192


@dataclass(frozen=True)
class Progress:
    """Step of the newest checkpoint and when it was committed; last step, loss and time in the metrics."""

    checkpoint_step: int = 0
    checkpoint_time: float | None = None
    step: int = 0
    loss: float | None = None
    time: float | None = None


def append_event(config: Config, job: str, event: str, **details: Any) -> Event:
    """Add one event to a job's notes and return it."""
    line = {"job": job, "event": event, "time": round(time.time(), 3), **redact_values(details)}
    add_line(events_url(config, job), json.dumps(line).encode())
    return line


def read_events(config: Config, job: str) -> list[Event]:
    """The events of one job, oldest first."""
    return _parse(read_lines(events_url(config, job)))


def read_all_events(config: Config) -> dict[str, list[Event]]:
    """The events of all jobs that had any."""
    return {job: _parse(lines) for job, lines in read_folder(events_url(config, "x").rsplit("/", 1)[0]).items()}


def merge_events(config: Config, submitted: Iterable[Event]) -> None:
    """Write `jobs.jsonl`: the events of all jobs and what the launcher submitted, by time."""
    happened = [event for events in read_all_events(config).values() for event in events]
    lines = sorted([*happened, *submitted], key=lambda event: float(event["time"]))
    paths.replace_bytes(all_events_url(config), "".join(json.dumps(line) + "\n" for line in lines).encode())


def progress_of(config: Config, job: str) -> Progress:
    """What the store says of one job."""
    return _progress(_last_line(metrics_url(config, job)), *newest_checkpoint(config, job))


def _progress(line: dict[str, Any], step: int, committed: float | None) -> Progress:
    loss, seconds = (number_in(line, name) for name in ("loss", "time"))
    return Progress(step, committed, int(number_in(line, "step") or 0), loss, seconds)


def progress_of_each(config: Config, jobs: Iterable[str], finished: Mapping[str, Label]) -> dict[str, Progress]:
    """What the store says of many jobs; on an object store those that are `finished` say it themselves.

    There listings tell of the others what there is, and only the metrics of jobs under way are read.
    """
    known = list(jobs)
    if paths.is_local(config.output_dir):
        return {job: progress_of(config, job) for job in known}
    found = {job: _progress(_as_line(finished[job]), 0, None) for job in known if job in finished}
    urls = {job: metrics_url(config, job) for job in known if job not in finished}
    if not urls:
        return found
    there = {info.url: info.size for info in paths.walk(metrics_url(config, "x").rpartition("/")[0])}
    read = [job for job, url in urls.items() if url in there]
    tails = in_order(lambda job: _last_line(urls[job], there[urls[job]]), read, READS_AT_ONCE)
    lines, newest = dict(zip(read, tails, strict=True)), _newest_checkpoints(config, read, len(known))
    return found | {job: _progress(lines.get(job, {}), *newest.get(job, (0, None))) for job in urls}


def _newest_checkpoints(config: Config, jobs: list[str], among: int) -> dict[str, tuple[int, float | None]]:
    """Step and time of the newest checkpoint of jobs, by listings of the manifests that there are.

    Few jobs `among` many are listed one by one, since what the others have left would be more pages.
    """
    found: dict[str, tuple[int, float | None]] = {}
    root = checkpoint_url(config, "x").rpartition("/")[0]
    roots = [checkpoint_url(config, job) for job in jobs] if len(jobs) * JOBS_OF_A_LISTING < among else [root]
    for info in (info for infos in in_order(paths.walk, roots, READS_AT_ONCE) for info in infos):
        job, _, name = paths.relative(info.url, root).partition("/")
        step, _, file = name.partition("/")
        if file == MANIFEST_NAME and STEP_NAME.fullmatch(step):
            number = int(step.removeprefix("step-"))
            found[job] = max(found.get(job, (0, None)), (number, info.modified), key=lambda one: one[0])
    return found


def _as_line(label: Label) -> dict[str, Any]:
    """What a finished job's last line of metrics says too."""
    return {"step": label.facts.get("steps"), "loss": label.facts.get("train_loss")}


def newest_checkpoint(config: Config, job: str) -> tuple[int, float | None]:
    """Step and time of the newest committed checkpoint; 0 when there is none."""
    url = checkpoint_url(config, job)
    for name in sorted(filter(STEP_NAME.fullmatch, paths.list_folder(url)), reverse=True):
        if artifact := find_artifact(paths.join(url, name)):
            created = datetime.datetime.fromisoformat(artifact.manifest.created).timestamp()
            return int(name.removeprefix("step-")), created
    return 0, None


def _last_line(url: str, size: int | None = None) -> dict[str, Any]:
    """The last metrics line that has a loss; an empty one when there is none. A known size saves a request."""
    try:
        size = paths.file_size(url) if size is None else size
        content = paths.read_bytes(url, max(0, size - TAIL_BYTES), size)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found: dict[str, Any] = {}
    for line in objects_in(content)[0]:
        found = line if "loss" in line else found
    return found


def number_in(line: dict[str, Any], name: str) -> float | None:
    """A value of a line of metrics, if it is there and a number."""
    value = line.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _parse(content: bytes) -> list[Event]:
    """Lines that are whole and hold what an event does; one that a killed node left torn is passed over."""
    events = []
    for line in objects_in(content)[0]:
        try:
            events.append(dict(NOTED.validate_python(line)))
        except ValueError:
            continue
    return events
