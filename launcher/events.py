"""What happened to each job, as JSON lines {job, event, time, …}: submitted, started, requeued, ended.

Every job writes a file of its own, because appending from many nodes to one file loses lines; `merge` makes the one
file that reports read. Times are seconds since 1970.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import Required, TypedDict

from checkpoints import paths
from checkpoints.parsing import parse_object
from checkpoints.redact import redact_values
from launcher.places import all_events_url, events_url
from modularforge.config import Config

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


def append_event(config: Config, job: str, event: str, **details: Any) -> Event:
    """Add one event to a job's file and return it."""
    line = {"job": job, "event": event, "time": round(time.time(), 3), **redact_values(details)}
    url, content = events_url(config, job), json.dumps(line) + "\n"
    if paths.is_local(url):
        with paths.open_to_append(paths.local_path(url)) as file:
            file.write(content.encode())
    else:
        paths.replace_bytes(url, _read(url) + content.encode())
    return line


def read_events(config: Config, job: str) -> list[Event]:
    """The events of one job, oldest first."""
    return _parse(_read(events_url(config, job)))


def read_all_events(config: Config) -> dict[str, list[Event]]:
    """The events of all jobs that had any."""
    folder = events_url(config, "x").rsplit("/", 1)[0]
    jobs = [name.removesuffix(".jsonl") for name in paths.list_folder(folder) if name.endswith(".jsonl")]
    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        found = list(readers.map(lambda job: read_events(config, job), jobs))
    return dict(zip(jobs, found, strict=True))


def merge_events(config: Config, submitted: Iterable[Event]) -> None:
    """Write `jobs.jsonl`: the events of all jobs and what the launcher submitted, by time."""
    happened = [event for events in read_all_events(config).values() for event in events]
    lines = sorted([*happened, *submitted], key=lambda event: float(event["time"]))
    paths.replace_bytes(all_events_url(config), "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read(url: str) -> bytes:
    try:
        return paths.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _parse(content: bytes) -> list[Event]:
    """Lines that are whole and hold what an event does; one that a killed node left torn is passed over."""
    events = []
    for line in content.decode(errors="replace").split("\n"):
        try:
            events.append(dict(NOTED.validate_python(parse_object(line))))
        except ValueError:
            continue
    return events
