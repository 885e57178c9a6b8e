"""Metrics of a job in the tools that people use already: Weights & Biases, MLflow and trackio.

The JSON lines stay the record (`modularforge/log.py`); a writer tells the same numbers to one tool more. A job is one
run of the tool, in the group of its run, and goes on under the same name when it resumes. Each tool is set up by its
own variables (`WANDB_*`, `MLFLOW_*`, `TRACKIO_*`) and writes to a folder where they say nothing. A tool that fails
says so once and never stops a training.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from checkpoints import paths
from modularforge.errors import ConfigError
from modularforge.json_lines import moment, number_of

MOST_STEPS = 2.0**53
NOT_SCALARS = ("job", "step", "time")
PROJECT = "modularforge"  # of jobs of runs whose variables name none


class Writer(Protocol):
    """What is told of a job's metrics; used on rank 0 only."""

    def restart(self, lines: Iterable[str]) -> None:
        """Begin, or go on behind these metrics lines."""

    def write(self, values: dict[str, Any]) -> None:
        """Tell one metrics line."""

    def flush(self) -> None:
        """Make what was told visible to others."""

    def close(self) -> None:
        """The job has ended or stopped."""


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line that are curves."""
    found = {name: number_of(value) for name, value in values.items() if name not in NOT_SCALARS}
    return {name: number for name, number in found.items() if number is not None}


def step_of(values: Mapping[str, Any]) -> int:
    """The step of a metrics line, which may be of another program."""
    return int(min(MOST_STEPS, max(0.0, float(values["step"]))))


def module_of(name: str, extra: str) -> Any:
    """The tool's package; raises ConfigError with the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"metrics.writers must not have {name} without its package, but that is not installed; run `pip install "
            f"'modularforge[{extra}]'`, or leave it out"
        ) from error


class JobNames:
    """What a tool calls a job, from the URL of its metrics: `RUN/metrics/JOB.jsonl`."""

    def __init__(self, metrics_url: str) -> None:
        folder, _, file = metrics_url.rpartition("/")
        self.job, self.folder = file.removesuffix(".jsonl"), folder
        self.group = folder.rpartition("/")[0].rpartition("/")[2] or PROJECT
        self.key = hashlib.sha256(metrics_url.encode()).hexdigest()[:16]
        self.name = f"{self.group}/{self.job}"

    def local(self, tool: str) -> str | None:
        """Where a tool may write beside the metrics; None on an object store, where it takes its own place here."""
        return str(paths.local_path(self.folder) / tool) if paths.is_local(self.folder) else None


class _Wandb:
    """A run of Weights & Biases, on this machine (`wandb sync` sends it) unless a key or `WANDB_MODE` is set."""

    def __init__(self, names: JobNames) -> None:
        self.names, self._wandb = names, module_of("wandb", "wandb")
        self._run: Any = None

    def restart(self, lines: Iterable[str]) -> None:
        is_online = "WANDB_API_KEY" in os.environ
        mode = os.environ.get("WANDB_MODE") or ("online" if is_online else "offline")
        folder = self.names.local("")
        if folder:
            os.makedirs(folder, exist_ok=True)  # or it takes the temporary folder
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=self.names.group, name=self.names.name,
            job_type=self.names.job.partition("-")[0], id=self.names.key, resume="allow", mode=mode, dir=folder,
            reinit="create_new", settings=self._wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own count only rises, and steps are told again
        for line in () if self._run.resumed else lines:
            self.write(json.loads(line))

    def write(self, values: dict[str, Any]) -> None:
        self._run.log({**scalars(values), "step": step_of(values)})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow, of the experiment `MLFLOW_EXPERIMENT_NAME`; in `metrics/mlflow` unless a server is named."""

    def __init__(self, names: JobNames) -> None:
        self.names, self._mlflow = names, module_of("mlflow", "mlflow")
        self._client: Any = None
        self._run = ""

    def restart(self, lines: Iterable[str]) -> None:
        folder = self.names.local("mlflow")
        is_told = "MLFLOW_TRACKING_URI" in os.environ or not folder
        if not is_told:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions ask for
        self._client = self._mlflow.MlflowClient(None if is_told else f"file://{folder}")
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        found = self._client.search_runs([experiment], f"tags.modularforge_job = '{self.names.key}'", max_results=1)
        tags = {"modularforge_job": self.names.key, "modularforge_run": self.names.group}
        run = found[0] if found else self._client.create_run(experiment, tags=tags, run_name=self.names.name)
        self._run = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        for line in () if found else lines:
            self.write(json.loads(line))

    def _experiment(self, name: str) -> str:
        """Its id; made where it is new, by another job at the same moment perhaps."""
        found = self._client.get_experiment_by_name(name)
        try:
            return str(found.experiment_id if found else self._client.create_experiment(name))
        except self._mlflow.MlflowException:
            return str(self._client.get_experiment_by_name(name).experiment_id)

    def write(self, values: dict[str, Any]) -> None:
        when, step = int(1000 * (moment(values.get("time")) or 0.0)), step_of(values)
        entities = self._mlflow.entities
        told = [entities.Metric(name, number, when, step) for name, number in scalars(values).items()]
        self._client.log_batch(self._run, metrics=told)

    def flush(self) -> None:
        """It writes at once."""

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Trackio:
    """A run of trackio, in `TRACKIO_DIR` or the place in the home folder that it has for all projects."""

    def __init__(self, names: JobNames) -> None:
        self.names, self._trackio = names, module_of("trackio", "trackio")
        self._run: Any = None

    def restart(self, lines: Iterable[str]) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{self.names.name}-{self.names.key[:6]}"  # it knows runs by their names alone
        self._run = self._trackio.init(project=project, name=name, resume="allow", embed=False)
        for line in lines:
            self.write(json.loads(line))

    def write(self, values: dict[str, Any]) -> None:
        self._run.log(scalars(values), step=step_of(values))

    def flush(self) -> None:
        """It writes by itself."""

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[JobNames], Writer]] = {
    "wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio,
}  # fmt: skip


class _Guarded:
    """A writer that is left alone after its first failure: a server that is down must not stop a training."""

    def __init__(self, name: str, writer: Writer, warn: Callable[..., None]) -> None:
        self.name, self._warn = name, warn
        self._writer: Writer | None = writer
        self._has_begun = False

    def restart(self, lines: Iterable[str]) -> None:
        self._has_begun = True
        self._try(lambda writer: writer.restart(lines))

    def write(self, values: dict[str, Any]) -> None:
        if not self._has_begun:
            self.restart(())
        self._try(lambda writer: writer.write(values))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        if self._has_begun:
            self._try(lambda writer: writer.close())
        self._has_begun = False

    def _try(self, act: Callable[[Writer], None]) -> None:
        if self._writer is None:
            return
        try:
            act(self._writer)
        except Exception as error:  # of any kind: they are other programs
            self._writer = None
            self._warn("%s no longer gets the metrics of this job: %s", self.name, error)


def writers_of(metrics_url: str, names: Iterable[str], warn: Callable[..., None]) -> list[Writer]:
    """The writers of a metrics file by their names in `metrics.writers`; raises ConfigError where one is missing."""
    return [_Guarded(name, WRITERS[name](JobNames(metrics_url)), warn) for name in dict.fromkeys(names)]
