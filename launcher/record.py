"""The run record in the store: whose run it is, and every submission to Slurm, or to this machine, with its job id.

A submission is written down before sbatch is called and again with the job id afterwards, so a launcher that is killed
in between leaves an entry without a job id; the next one looks for it by its key. What is finished is told by
manifests alone, never by this record.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from checkpoints import paths
from checkpoints.parsing import parse_object
from checkpoints.redact import redact
from checkpoints.urls import checked_part
from launcher.allocation import LOCAL
from launcher.events import Event
from launcher.layout import record_url
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.errors import DataError, MismatchError
from modularforge.mistakes import config_error, shown
from modularforge.pipeline import STAGES, STANDS_FOR, JobName, stage_settings, value_of

# A record may come from a bucket that others write, and its words go into paths, and to squeue and scancel.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
JobId = Annotated[str, Field(pattern=rf"^({LOCAL})?[0-9]+$", max_length=20)]
Folder = Annotated[str, AfterValidator(lambda name: name and checked_part(name))]
Index = Annotated[int, Field(ge=0, lt=1_000_000)]
Time = Annotated[float, Field(ge=0, lt=1e11)]

# Partitions may be added to a run, so their number is not part of what it is.
GROWING = ("experts.count",)


@dataclass
class Submission:
    """One job, or an array of the experts `indices`, of which index `offset` is array task 0.

    `work` is the name of the work folder with its log; older launchers noted none.
    """

    key: Word
    group: Word
    indices: list[Index] = field(default_factory=list)
    offset: Index = 0
    job: JobId | None = None
    after: list[JobId] = field(default_factory=list)
    submitted: Time = field(default_factory=time.time)
    withdrawn: bool = False
    work: Folder = ""

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks it carries."""
        return [str(JobName(self.group, index)) for index in self.indices] if self.indices else [self.group]

    @property
    def is_local(self) -> bool:
        """Whether processes of a local launcher run it, not Slurm."""
        return (self.job or "").startswith(LOCAL)

    def place_of(self, task_name: str) -> int | None:
        """Which one of its array a task is for Slurm; None for what is no array."""
        index = JobName.parse(task_name).index
        return index - self.offset if self.indices and index is not None else None

    def job_name(self, task_name: str) -> str:
        """The job of one of its tasks, once it has a job: `12`, or `12_4` for a task of an array."""
        index = self.place_of(task_name)
        return f"{self.job}" if index is None else f"{self.job}_{index}"

    def events(self) -> list[Event]:
        """Its tasks' `submitted` events."""
        return [
            {"job": name, "event": "submitted", "time": round(self.submitted, 3), "slurm_job": self.job}
            for name in self.task_names
        ]


@dataclass
class Record:
    """One run: its identity, its settings, and its submissions, oldest first."""

    run_id: Word
    identity: dict[str, Any]
    config: dict[str, Any]
    created: Time = field(default_factory=time.time)
    checked: str = ""
    submissions: list[Submission] = field(default_factory=list)

    @property
    def live(self) -> list[Submission]:
        """Submissions with a job id that were not taken back."""
        return [item for item in self.submissions if item.job and not item.withdrawn]

    @property
    def is_local(self) -> bool:
        """Whether the run was last started on this machine, not on Slurm."""
        return bool(self.submissions) and self.submissions[-1].is_local

    def settings(self) -> Config:
        """The settings the run was last submitted with."""
        return make_config(self.config, "the run record")

    def events(self) -> list[Event]:
        """What was submitted, as events."""
        return [event for item in self.submissions if item.job for event in item.events()]


RECORD = TypeAdapter(Record)


def identity_of(config: Config) -> dict[str, Any]:
    """The settings that decide what the run's artifacts are, by dotted name; the evaluation may change.

    A stage's own value of a general setting stands under its own name, beside the general one that others have.
    """
    values, found = config.model_dump(mode="json"), {}
    for stage in STAGES:
        if stage != "evaluate":
            settings = stage_settings(config, stage)
            for own, general in STANDS_FOR.get(stage, {}).items():
                if settings.get(general) != value_of(values, general):
                    settings[own] = settings.pop(general)
            found.update(settings)
    return {name: value for name, value in sorted(found.items()) if name not in GROWING}


def run_id_of(config: Config) -> str:
    """Follows from the settings, the data, and where the run lies."""
    content = json.dumps([identity_of(config), config.output_dir, config.data_url], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def new_record(config: Config) -> Record:
    """The record of a run of which nothing was submitted yet."""
    return Record(run_id_of(config), identity_of(config), config.model_dump(mode="json"))


def new_key(group: str, number: int) -> str:
    """A name for a submission that nobody else uses."""
    return f"{number:03d}-{group}-{os.urandom(4).hex()}"


def load_record(config: Config) -> Record | None:
    """The record of the run at `output_dir`, or None; raises DataError for a file that is no such record."""
    url = record_url(config)
    try:
        values = parse_object(paths.read_bytes(url))
        return RECORD.validate_json(json.dumps(values), strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise _unreadable(url, str(config_error(error, "it"))) from error
    except ValueError as error:
        raise _unreadable(url, str(error)) from error


def _unreadable(url: str, reason: str) -> DataError:
    return DataError(
        f"{url} must be the launcher's record of this run, but cannot be read: {reason}; restore it from a copy, or "
        "cancel the run's jobs with scancel and delete it"
    )


def require_record(config: Config) -> Record:
    """The record of the run at `output_dir`; raises MismatchError when there is none."""
    record = load_record(config)
    if record is None:
        raise MismatchError(
            f"{redact(config.output_dir)} must hold a run that the launcher started, but has none; start one with "
            "`python -m launcher` here, or with --cluster on Slurm, or name its --output-dir"
        )
    return record


def save_record(config: Config, record: Record) -> None:
    """Write the record in one step."""
    content = json.dumps({**asdict(record), "config": config.model_dump(mode="json")}, indent=1)
    paths.replace_bytes(record_url(config), (content + "\n").encode())


def check_same_run(config: Config, record: Record) -> None:
    """Raise MismatchError with the difference when a run with other settings lies there."""
    here, there = identity_of(config), record.identity
    if here != there:  # earlier versions recorded a baseline's own value in the place of the general one
        there = identity_of(record.settings())
    lines = [
        f"  {name}: {shown(there.get(name))} in the run, {shown(here.get(name))} now"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if lines:
        raise MismatchError(
            f"{redact(config.output_dir)} must be continued with its own settings, but {len(lines)} differ; restore "
            "them, or start another run beside it with --new-run:\n" + "\n".join(lines)
        )


def beside(config: Config, record: Record) -> Config:
    """The same settings as a run of its own beside another one; data that did not change is shared."""
    changes: dict[str, Any] = {"output_dir": f"{config.output_dir.rstrip('/')}-{run_id_of(config)[:8]}"}
    old = record.settings()
    if all(stage_settings(old, stage) == stage_settings(config, stage) for stage in ("prepare-data", "partition")):
        changes["data_dir"] = old.data_url
    return config.model_copy(update=changes)
