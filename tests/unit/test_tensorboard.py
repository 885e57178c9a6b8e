"""Event files beside the metrics, read back by TensorBoard itself: on a folder, an object store, and after a resume."""

from __future__ import annotations

import math
import sys
import uuid
from pathlib import Path

import pytest

from checkpoints import paths
from modularforge.errors import ConfigError
from modularforge.log import MetricsLog, events_beside

tensorboard = pytest.importorskip("tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_hold_the_same_numbers_as_the_lines(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path / "backbone.jsonl"), "auto")
    log.write(job="backbone", time=1.0, step=10, loss=3.5, learning_rate=1e-3)
    log.write(job="backbone", time=2.0, step=10, validation_loss=math.inf)
    found = scalars(tmp_path / "tensorboard" / "backbone")
    assert found["loss"] == [(10, 3.5)]
    ((step, rate),) = found["learning_rate"]
    assert step == 10
    assert rate == pytest.approx(1e-3)
    assert found["validation_loss"] == [(10, math.inf)]


def test_a_resumed_job_tells_no_step_twice(tmp_path: Path) -> None:
    url = str(tmp_path / "backbone.jsonl")
    first = MetricsLog(url, "auto")
    first.restart_after(0)
    for step in (10, 20, 30):
        first.write(step=step, loss=float(step))
    resumed = MetricsLog(url, "auto")
    resumed.restart_after(20)
    resumed.write(step=30, loss=31.0)
    assert scalars(tmp_path / "tensorboard" / "backbone")["loss"] == [(10, 10.0), (20, 20.0), (30, 31.0)]


def test_an_object_store_gets_the_whole_file_at_every_flush(tmp_path: Path) -> None:
    folder = f"memory://events-{uuid.uuid4().hex}"
    log = MetricsLog(f"{folder}/backbone.jsonl", "on")
    log.restart_after(0)
    log.write(step=10, loss=3.5)
    log.flush()
    log.write(step=20, loss=3.0)
    log.flush()
    names = paths.list_folder(f"{folder}/tensorboard/backbone")
    assert len(names) == 1
    (tmp_path / names[0]).write_bytes(paths.read_bytes(f"{folder}/tensorboard/backbone/{names[0]}"))
    assert scalars(tmp_path)["loss"] == [(10, 3.5), (20, 3.0)]


def test_without_tensorboard_auto_writes_nothing_and_on_says_what_to_install(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    url = str(tmp_path / "backbone.jsonl")
    assert events_beside(url, "auto") is None
    assert events_beside(url, "off") is None
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        events_beside(url, "on")


def test_a_run_has_events_for_every_job(finished_run) -> None:
    folder = Path(finished_run.output_dir) / "metrics" / "tensorboard"
    jobs = {path.name.removesuffix(".jsonl") for path in (folder.parent).glob("*.jsonl")}
    assert {path.name for path in folder.iterdir()} == jobs
    assert "tokens_per_second" in scalars(folder / "expert-1")
