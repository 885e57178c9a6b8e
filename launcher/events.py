"""What happened to each job, as JSON lines {job, event, time, …}: submitted, started, requeued, ended.

Every job writes a file of its own, because appending from many nodes to one file loses lines; `merge` makes the one
file that reports read. Times are seconds since 1970.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from checkpoints import paths
from checkpoints.redact import redact_values
from launcher.places import all_events_url, events_url
from modularforge.config import Config

Event = dict[str, Any]
READS_AT_ONCE = 16
MOST_SECONDS = 1e11
NUMBERS = ("step", "last_step", "node_count", "gpus")


def append_event(config: Config, job: str, event: str, **details: Any) -> Event:
    """Add one event to a job's file and return it."""
    line = {"job": job, "event": event, "time": round(time.time(), 3), **redact_values(details)}
    url, content = events_url(config, job), json.dumps(line) + "\n"
    if paths.is_local(url):
        path = paths.local_path(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(content)
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
    """Lines that are whole; one that a killed node left torn is passed over."""
    events = []
    for line in content.decode(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and _is_event(value):
            events.append(value)
    return events


def _is_event(value: dict[str, Any]) -> bool:
    """Whether job and event are texts, and the time and the steps that it may tell are numbers."""
    numbers = [value.get("time"), *(value[name] for name in NUMBERS if name in value)]
    is_text = isinstance(value.get("job"), str) and isinstance(value.get("event"), str)
    return is_text and all(type(number) in (int, float) and abs(number) < MOST_SECONDS for number in numbers)
