"""Weights & Biases, MLflow and trackio get a job's numbers without a network, each read back from what it wrote itself.

The tests of a tool run where its package is installed: they bring large trees, and `make test` needs none of them.
`make test-writers` runs them all, in an environment of its own (tests/unit/test_writer_tools.py).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from modularforge.errors import ConfigError
from modularforge.log import MetricsLog
from modularforge.metric_writers import WRITERS, JobNames, writers_of
from modularforge.pipeline import stage_settings
from modularforge.training.job import Job
from tests.conftest import tiny_config

VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def train(url: str, writer: str, steps: range, resumed_at: int = 0) -> None:
    log = MetricsLog(url, "off", [writer])
    log.restart_after(resumed_at)
    for step in steps:
        log.write(job="backbone", time=1e9 + step, step=step, loss=4.0 - step / 10, learning_rate=1e-3)
    log.write(job="backbone", time=2e9, step=steps[-1], validation_loss=3.5)
    log.flush()
    log.close()


def test_mlflow_has_the_losses_of_a_job_that_resumed(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow (extra `mlflow`) is not installed")
    url = str(tmp_path / "run" / "metrics" / "backbone.jsonl")
    train(url, "mlflow", range(1, 4))
    train(url, "mlflow", range(3, 6), resumed_at=2)
    client = mlflow.MlflowClient(f"file://{tmp_path}/run/metrics/mlflow")
    experiment = client.get_experiment_by_name("modularforge")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run/backbone"
    assert run.info.status == "FINISHED"
    told = {one.step: one.value for one in client.get_metric_history(run.info.run_id, "loss")}
    assert told == {step: pytest.approx(4.0 - step / 10) for step in range(1, 6)}
    assert run.data.metrics["validation_loss"] == 3.5


def test_wandb_has_them_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb (extra `wandb`) is not installed")
    url = str(tmp_path / "run" / "metrics" / "backbone.jsonl")
    train(url, "wandb", range(1, 4))
    (file,) = (tmp_path / "run" / "metrics" / "wandb").glob("offline-run-*/*.wandb")
    told = [row for row in finished_history(file) if "loss" in row]
    assert [(row["step"], row["loss"]) for row in told] == [(1, 3.9), (2, 3.8), (3, 3.7)]


def finished_history(file: Path) -> list[dict[str, Any]]:
    """The same once it is whole: a process of wandb's own writes it, behind the end of the run."""
    end = time.monotonic() + 60
    while (found := wandb_history(file)) is None and time.monotonic() < end:
        os.sched_yield()
    assert found is not None, f"{file} has no end"
    return found


def wandb_history(file: Path) -> list[dict[str, Any]] | None:
    """Rows of an offline file, None before its end: a log of LevelDB's form behind 7 bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, rows, pieces, is_whole = file.read_bytes(), 7, [], b"", False
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(pieces)
            items = record.history.item if record.WhichOneof("record_type") == "history" else []
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
            pieces, is_whole = b"", is_whole or record.WhichOneof("record_type") == "exit"
    return rows if is_whole else None


def test_trackio_has_them_in_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio (extra `trackio`) is not installed")
    train(str(tmp_path / "run" / "metrics" / "backbone.jsonl"), "trackio", range(1, 4))
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics order by step, id").fetchall()
    told = [(step, json.loads(text)["loss"]) for _, step, text in rows if "loss" in json.loads(text)]
    assert told == [(1, 3.9), (2, 3.8), (3, 3.7)]
    assert {name.rpartition("-")[0] for name, *_ in rows} == {"run/backbone"}


class Recorder:
    """A tool of our own: what the interface promises, whatever is installed."""

    told: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, names: JobNames) -> None:
        self.names = names

    def restart(self, lines: Any) -> None:
        self.told.append(("restart", [json.loads(line)["step"] for line in lines]))

    def write(self, values: dict[str, Any]) -> None:
        self.told.append(("write", values["step"]))

    def flush(self) -> None:
        self.told.append(("flush", self.names.name))

    def close(self) -> None:
        self.told.append(("close", self.names.name))


def test_a_tool_is_told_what_the_lines_hold_and_when_the_job_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(WRITERS, "wandb", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    url = str(tmp_path / "run" / "metrics" / "expert-1.jsonl")
    train(url, "wandb", range(1, 3))
    train(url, "wandb", range(2, 3), resumed_at=1)
    ends = [("write", 2), ("write", 2), ("flush", "run/expert-1"), ("close", "run/expert-1")]
    assert Recorder.told == [("restart", []), ("write", 1), *ends, ("restart", [1]), *ends]


def test_a_tool_that_fails_is_left_alone_and_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Broken(Recorder):
        def write(self, values: dict[str, Any]) -> None:
            raise ConnectionError("nobody is there")

    monkeypatch.setitem(WRITERS, "mlflow", Broken)
    said: list[str] = []
    (writer,) = writers_of("/r/metrics/b.jsonl", ["mlflow"], lambda text, *values: said.append(text % values))
    for step in (1, 2):
        writer.write({"step": step, "loss": 1.0})
    assert said == ["mlflow no longer gets the metrics of this job: nobody is there"]
    url = str(tmp_path / "run" / "metrics" / "backbone.jsonl")
    train(url, "mlflow", range(1, 4))
    assert len(Path(url).read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tool_that_is_not_installed_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'modularforge\[{name}\]'"):
        MetricsLog(str(tmp_path / "backbone.jsonl"), "off", [name])


def test_writers_are_of_a_job_and_of_no_identity(tmp_path: Path) -> None:
    plain, told = tiny_config(str(tmp_path)), tiny_config(str(tmp_path), metrics={"writers": ["wandb"]})
    assert Job.of_run(told, "backbone", told.backbone, "fingerprint").writers == ("wandb",)
    assert stage_settings(plain, "backbone") == stage_settings(told, "backbone")
