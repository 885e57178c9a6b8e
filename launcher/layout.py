"""Where a run keeps what the launcher writes: the record and the events in the store, logs and code on shared disk."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.config import Config

FOLDER = "cluster"
OTHER = re.compile(r"[^A-Za-z0-9._]+")
READABLE_CHARACTERS = 100  # names may have 255 bytes


def record_url(config: Config) -> str:
    """The run record: what was submitted, and under which job ids."""
    return paths.join(config.output_dir, FOLDER, "run.json")


def lock_url(config: Config) -> str:
    """Exists while a launcher submits."""
    return paths.join(config.output_dir, FOLDER, "lock.json")


def events_url(config: Config, job: str) -> str:
    """What happened to one job, a JSON line per event; only the job itself writes there."""
    return paths.join(config.output_dir, FOLDER, "events", f"{job}.jsonl")


def stored_log_url(config: Config, job: str) -> str:
    """The end of a job's log, which the job itself keeps there where the run is on an object store."""
    return paths.join(config.output_dir, FOLDER, "logs", f"{job}.log")


def all_events_url(config: Config) -> str:
    """The events of all jobs in one file, for reports."""
    return paths.join(config.output_dir, "jobs.jsonl")


def folder_name(run: str) -> str:
    """A folder's name for a run's URL: readable, and with a hash, because `a-b` and `a/b` read alike."""
    readable = OTHER.sub("-", redact(run))[-READABLE_CHARACTERS:].strip("-.")
    return f"{readable}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def old_folder_name(run: str) -> str:
    """The name that older launchers gave, in which submissions of theirs still have their logs."""
    return run.replace("://", "-").strip("/").replace("/", "-")


def work_folder(config: Config, name: str = "") -> Path:
    """Logs, scripts and code, on a disk that all nodes see; a folder of the run's own, of this name if given."""
    run = run_path(config)
    if paths.is_local(run) and not config.cluster.work_dir:
        return Path(run) / FOLDER
    root = paths.local_path(config.cluster.work_dir or "modularforge-jobs").absolute()
    return root / (name or folder_name(run))


def run_path(config: Config) -> str:
    """The run's URL, or its whole path on this machine."""
    run = config.output_dir
    return str(paths.local_path(run).absolute()) if paths.is_local(run) else run


def log_pattern(config: Config, group: str, offset: int = 0, is_array: bool = False) -> str:
    """Log file of a group's jobs as sbatch takes it: `%a` is the index within an array that starts at `offset`."""
    folder = str(work_folder(config) / "logs").replace("%", "%%")
    return f"{folder}/{_log_name(group, '%a' if is_array else None, offset)}"


def log_file(config: Config, group: str, index: int | None = None, offset: int = 0, work: str = "") -> Path:
    """Log file of one job; `work` is the name of its work folder if it has another one than now."""
    name = _log_name(group, None if index is None else str(index - offset), offset)
    return work_folder(config, work) / "logs" / name


def _log_name(group: str, index: str | None, offset: int) -> str:
    return f"{group}.log" if index is None else f"{group}-{f'{offset}+' if offset else ''}{index}.log"
