"""Where a run keeps what the launcher writes: the record and the events in the store, logs and code on shared disk."""

from __future__ import annotations

from pathlib import Path

from checkpoints import paths
from modularforge.config import Config

FOLDER = "cluster"


def record_url(config: Config) -> str:
    """The run record: what was submitted, and under which job ids."""
    return paths.join(config.output_dir, FOLDER, "run.json")


def lock_url(config: Config) -> str:
    """Exists while a launcher submits."""
    return paths.join(config.output_dir, FOLDER, "lock.json")


def events_url(config: Config, job: str) -> str:
    """What happened to one job, a JSON line per event; only the job itself writes there."""
    return paths.join(config.output_dir, FOLDER, "events", f"{job}.jsonl")


def all_events_url(config: Config) -> str:
    """The events of all jobs in one file, for reports."""
    return paths.join(config.output_dir, "jobs.jsonl")


def work_folder(config: Config) -> Path:
    """Logs, scripts and frozen code, on a disk that all nodes see; a folder of the run's own."""
    run = config.output_dir
    if paths.is_local(run):
        run = str(paths.local_path(run).absolute())
        if not config.cluster.work_dir:
            return Path(run) / FOLDER
    name = run.replace("://", "-").strip("/").replace("/", "-")
    return Path(config.cluster.work_dir or "modularforge-jobs").absolute() / name


def log_pattern(config: Config, group: str, offset: int = 0, is_array: bool = False) -> Path:
    """Log file of a group's jobs as Slurm writes it: `%a` is the index within an array that starts at `offset`."""
    start = f"{offset}+" if offset else ""
    return work_folder(config) / "logs" / (f"{group}-{start}%a.log" if is_array else f"{group}.log")


def log_file(config: Config, group: str, index: int | None = None, offset: int = 0) -> Path:
    """Log file of one job."""
    pattern = log_pattern(config, group, offset, index is not None)
    return Path(str(pattern).replace("%a", str((index or 0) - offset)))
