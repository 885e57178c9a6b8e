"""What a log file shows of a training, and how long reports say that the baselines' trainings are."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from checkpoints import screen
from checkpoints.screen import Progress, clock, progress
from launcher.status import _steps
from launcher.tasks import build_tasks
from modularforge.config import PhaseConfig, TrainedOnAll, TrainingConfig
from modularforge.experts.trainable import trainable
from modularforge.log import logger
from modularforge.observe.completion import parts_of
from modularforge.observe.report import draw_run
from modularforge.observe.run import Run, read_run
from modularforge.training import meter
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.meter import Reporter, count
from modularforge.training.optimizer import Trainer, build_optimizer
from tests.conftest import tiny_config
from tests.synthetic_runs import write_metrics
from tests.unit.test_loop import Lines, squared_error

PHASE = PhaseConfig(steps=800, batch_size=8, peak_learning_rate=0.1, warmup_steps=1)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def trainer_at(step: int, loss: float | None = None, validation: float | None = None) -> Trainer:
    model = nn.Linear(1, 1)
    learns = trainable(model, squared_error)
    trainer = Trainer(learns, build_optimizer(learns.groups, PHASE, TrainingConfig()))
    trainer.step, trainer.train_loss, trainer.validation_loss = step, loss, validation
    return trainer


def test_a_log_gets_a_line_every_two_seconds_at_the_most_and_one_at_the_end(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 18.0, 19.9, 20.5, 72.0, 252.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    told = Reporter(Job("backbone", PHASE, TrainingConfig()), Progress(), 0, speaks=True)
    told.report(trainer_at(200, 4.31), 2.1e-3, 36_040)
    told.report(trainer_at(201, 4.30), 2.1e-3, 36_040)
    told.report(trainer_at(205, 4.2, 4.4), 1e-5, 950)
    told.report(trainer_at(800, 3.9, 4.0), 0.0, 950)  # the line at the end says it
    told.finish(trainer_at(800, 3.9, 4.0), 36_040)
    assert log.getvalue().splitlines() == [
        "backbone 200/800 (25 %)  loss 4.310  36k tok/s  lr 2.1e-3  0:54 left",
        "backbone 205/800 (26 %)  loss 4.200  val 4.400  950 tok/s  lr 1.0e-5  1:00 left",
        "backbone done: 800 steps, loss 3.900, validation 4.000, 36k tok/s, 4:12",
    ]


def test_a_line_says_which_share_of_the_devices_peak_is_reached(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 60.0, 120.0, 180.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(meter, "device_peak", lambda: SimpleNamespace(share=lambda rate: rate / 1e9))
    job = Job("backbone", PHASE, TrainingConfig(), flops_per_unit=6_667.0)
    told = Reporter(job, Progress(), 0, speaks=True, processes=2)
    told.report(trainer_at(200, 4.31, 4.4), 2.1e-3, 36_000)
    told.report(trainer_at(400, 4.31), 2.1e-3, 360)
    told.finish(trainer_at(800, 3.9, 4.0), 36_000)
    assert log.getvalue().splitlines() == [
        "backbone 200/800 (25 %)  loss 4.310  val 4.400  36k tok/s  12 % of peak  lr 2.1e-3  3:00 left",
        "backbone 400/800 (50 %)  loss 4.310  360 tok/s  0.1 % of peak  lr 2.1e-3  2:00 left",
        "backbone done: 800 steps, loss 3.900, validation 4.000, 36k tok/s, 12 % of peak, 3:00",
    ]


def lines_of(
    monkeypatch: pytest.MonkeyPatch, *arguments: Any, amounts: Iterable[float] = (1, 1, 1), **more: Any
) -> str:
    """What a log gets of something that takes four seconds for each amount."""
    stream, now = io.StringIO(), iter(range(0, 100, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    handler = logging.StreamHandler(stream)
    screen.logger.addHandler(handler)
    monkeypatch.setattr(screen.logger, "level", logging.INFO)
    screen.logger.setLevel(logging.INFO)
    try:
        with progress(*arguments, **more) as told:
            for amount in amounts:
                told.advance(amount, f"{amount} more" if amount > 9 else "")
    finally:
        screen.logger.removeHandler(handler)
    return stream.getvalue()


def test_what_is_no_training_tells_a_log_how_far_it_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, "evaluate", 9, "models", amounts=[1] * 6) == (
        "evaluate 3/9 models (33 %)  0:24 left\nevaluate 6/9 models (67 %)  0:12 left\n"
    )
    assert lines_of(monkeypatch, "pull", 5e9, "bytes", amounts=[1e6, 1e9, 1.5e9]) == (
        "pull 2.5 GB/5.0 GB (50 %)  1500000000.0 more  0:12 left\n"
    )
    assert lines_of(monkeypatch, "tokenise train", None, "documents", amounts=[1000] * 3) == (
        "tokenise train 3,000 documents  1000 more\n"
    )
    assert lines_of(monkeypatch, "quick", 9, "models", amounts=[1]) == "", "what is done at once says nothing"
    assert lines_of(monkeypatch, "rank 1", 9, "models", amounts=[1] * 6, is_wanted=False) == ""


def test_ranks_without_a_voice_say_nothing_and_a_job_that_goes_on_counts_from_there(log: io.StringIO) -> None:
    job = Job("backbone", PHASE, TrainingConfig())
    silent = Reporter(job, Progress(), 0, speaks=False)
    silent.report(trainer_at(1, 4.0), 1e-3, 10)
    silent.finish(trainer_at(800, 4.0), 10)
    assert log.getvalue() == ""
    Reporter(job, Progress(), 800, speaks=True).finish(trainer_at(800, None, 4.0), 0.0)
    assert log.getvalue() == "backbone done: 800 steps, validation 4.000, 0:00\n"


def test_clocks_and_counts_are_short() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 72, 3600, 90_061)] == [
        "0:00",
        "1:00",
        "1:12",
        "1:00:00",
        "25:01:01",
    ]
    assert [count(value) for value in (0, 0.34, 850, 3_640, 36_400, 1.25e6)] == [
        "0",
        "0.3",
        "850",
        "3.6k",
        "36k",
        "1.2M",
    ]


def train(steps: int, training: TrainingConfig) -> None:
    job = Job("backbone", PHASE.model_copy(update={"steps": steps}), training)
    fit(trainable(nn.Linear(1, 1), squared_error), Lines(), job, lambda: 1.5, World())


def test_many_short_steps_do_not_fill_the_log(log: io.StringIO) -> None:
    train(60, TrainingConfig(log_every=1, validate_every=20))
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("backbone 1/60 (2 %)  loss ")
    assert lines[-1].startswith("backbone done: 60 steps, loss ")
    assert "validation 1.500" in lines[-1]
    assert len(lines) <= 4


def test_the_note_stays_behind_the_bar_on_a_terminal(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", lambda **_: Console(file=shown, width=160, force_terminal=True))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    train(6, TrainingConfig(log_every=2, validate_every=2))
    assert "val 1.500" in shown.getvalue()
    assert [line.split(":")[0] for line in log.getvalue().splitlines()] == ["backbone done"], "the bar said the rest"


@pytest.mark.parametrize("batch_size", [None, 4, 8, 24, 100])
@pytest.mark.parametrize("baseline", ["dense", "dense_wide", "joint"])
def test_a_baseline_is_as_long_in_the_report_as_it_trains(
    tmp_path: Path, baseline: TrainedOnAll, batch_size: int | None
) -> None:
    experts = {"count": 4, "steps": 250, "batch_size": 4}
    config = tiny_config(
        tmp_path, experts=experts, joint={"batch_size": batch_size}, evaluation={"baselines": [baseline]}
    )
    steps = config.baseline_phase(baseline).steps
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    write_metrics(str(tmp_path), baseline, dict.fromkeys(range(5, steps // 2 + 1, 5), 5.0))
    run = read_run(str(tmp_path))
    part = next(part for part in parts_of(run) if part.name == baseline)
    assert part.steps == steps
    assert part.tokens == 4 * 250 * 4 * config.model.context_length, "the tokens of all experts, however joined"
    assert part.share == pytest.approx(0.5, abs=0.05)
    task = next(task for task in build_tasks(config) if task.name == baseline)
    assert _steps(config, task) == steps


def test_a_batch_of_its_own_and_the_second_phase_of_btx_are_as_long_in_the_report(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        experts={"count": 4, "steps": 250, "batch_size": 4},
        dense={"batch_size": 40},
        joint={"batch_size": 16},
        btx={"steps": 70, "batch_size": None},
    )
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    for name in ("dense", "btx"):
        write_metrics(str(tmp_path), name, {5: 5.0})
    parts = {part.name: part for part in parts_of(read_run(str(tmp_path)))}
    context = config.model.context_length
    assert (parts["dense"].steps, parts["dense"].tokens) == (100, 100 * 40 * context)
    assert (parts["btx"].steps, parts["btx"].tokens) == (70, 70 * 16 * context)


def test_the_axis_of_a_joined_baseline_ends_with_its_training(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, experts={"count": 4, "steps": 250, "batch_size": 4}, joint={"batch_size": 16})
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    write_metrics(str(tmp_path), "dense", dict.fromkeys(range(5, 251, 5), 5.0))
    run = read_run(str(tmp_path))
    assert isinstance(run, Run)
    from modularforge.observe.curves import curve_figures

    axes = curve_figures(run)["loss"].axes[0]
    assert axes.get_xlim() == (0.0, 250.0)
    assert next(draw_run(run)).name == "timeline"
