"""The backbone as real processes: killed and continued, and on several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import find_artifact, paths
from modularforge.config import Config, TrainingConfig
from modularforge.config_files import to_yaml
from modularforge.pipeline import checkpoint_url, metrics_url, stage_url
from modularforge.run import Run
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from tests import joint_ranks, phases
from tests.conftest import ROOT, prepare_data, run_command, tiny_config

FLOAT_TOLERANCE = 2e-5
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    prepare_data(tiny_config(folder / "run", data_dir=str(folder / "data")))
    return str(folder / "data")


def settings_file(folder: Path, data_dir: str, **changes: object) -> tuple[Config, str]:
    config = tiny_config(folder / "run", data_dir=data_dir, **changes)
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return config, str(path)


def train(path: str, processes: int = 1) -> str:
    """What it said on standard error."""
    command = ["modularforge", "train", "--only", "backbone", "--config", path]
    if processes > 1:
        run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        return run_command(*run, *command).stderr
    return run_command(*command).stderr


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(paths.local_path(stage_url(config, "backbone")) / "model.safetensors")


def losses(config: Config) -> dict[int, float]:
    lines = paths.read_bytes(metrics_url(config, "backbone")).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def start_and_wait_for_checkpoint(config: Config, path: str) -> subprocess.Popen[bytes]:
    """A training process that has committed at least one checkpoint and has not finished."""
    command = [sys.executable, "-m", "modularforge", "train", "--only", "backbone", "--config", path]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE_SECONDS
    folder = paths.local_path(checkpoint_url(config, "backbone"))
    while not list(folder.glob("step-*/manifest.json")):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data_dir: str) -> Config:
    config, _ = settings_file(tmp_path_factory.mktemp("whole"), data_dir, backbone={"steps": 60})
    Run(config).make("backbone")  # here, with the same number of threads: a process of its own takes seconds to start
    return config


def test_kill_and_restart_gives_the_same_losses_and_weights_bit_for_bit(
    tmp_path: Path, data_dir: str, uninterrupted: Config
) -> None:
    config, path = settings_file(tmp_path, data_dir, backbone={"steps": 60})
    process = start_and_wait_for_checkpoint(config, path)
    process.kill()
    process.wait()
    assert find_artifact(stage_url(config, "backbone")) is None
    train(path)
    assert losses(config) == losses(uninterrupted)
    expected, found = weights(uninterrupted), weights(config)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR2]
)
def test_a_stop_signal_saves_a_checkpoint_and_the_same_command_continues(
    number: signal.Signals, tmp_path: Path, data_dir: str
) -> None:
    config, path = settings_file(tmp_path, data_dir, backbone={"steps": 5000})
    process = start_and_wait_for_checkpoint(config, path)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert number.name in stderr.decode()
    assert "run the same command again" in stderr.decode()
    assert find_artifact(stage_url(config, "backbone")) is None
    step = max(int(row.name[5:]) for row in paths.local_path(checkpoint_url(config, "backbone")).glob("step-*"))
    assert f"at step {step} of 5000" in stderr.decode()


def test_two_ranks_equal_one_process_at_the_same_global_batch(
    tmp_path: Path, data_dir: str, uninterrupted: Config
) -> None:
    config, path = settings_file(tmp_path, data_dir, backbone={"steps": 60})
    assert "Warning" not in train(path, processes=2), "nor in the log of a job of several ranks"
    expected, found = weights(uninterrupted), weights(config)
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 100 * FLOAT_TOLERANCE
    alone, together = losses(uninterrupted), losses(config)
    assert alone.keys() == together.keys()
    assert max(abs(alone[step] - together[step]) for step in alone) < FLOAT_TOLERANCE


def test_a_job_of_two_ranks_continues_on_one(tmp_path: Path, data_dir: str, uninterrupted: Config) -> None:
    config, path = settings_file(tmp_path, data_dir, backbone={"steps": 60})
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "modularforge"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "train", "--only", "backbone", "--config", path],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = paths.local_path(checkpoint_url(config, "backbone"))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list(folder.glob("step-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-KILL", "-f", path], check=False)  # torchrun's workers have sessions of their own
    assert list(folder.glob("step-*/manifest.json"))
    Run(config).make("backbone")
    alone, mixed = losses(uninterrupted), losses(config)
    assert alone.keys() == mixed.keys()
    assert max(abs(alone[step] - mixed[step]) for step in alone) < FLOAT_TOLERANCE


def test_accumulated_pieces_equal_one_batch(tmp_path: Path, data_dir: str, uninterrupted: Config) -> None:
    config, _ = settings_file(tmp_path, data_dir, backbone={"steps": 60, "accumulation_steps": 2})
    Run(config).make("backbone")
    alone, pieces = losses(uninterrupted), losses(config)
    assert max(abs(alone[step] - pieces[step]) for step in alone) < FLOAT_TOLERANCE


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs of two ranks each, from one process that forks them."""
    folder = tmp_path_factory.mktemp("two")
    run_command("tests.joint_ranks", str(folder), "mixture", "compiled", "phases")
    return folder


def test_two_ranks_go_through_phases_as_one_process_does(in_two: Path, tmp_path: Path) -> None:
    alone = phases.train(tmp_path, World()).model.state_dict()
    found = torch.load(in_two / "phases" / "found.pt", weights_only=True)["weights"]
    assert all(torch.allclose(found[name], alone[name], atol=1e-5) for name in alone)


@pytest.mark.parametrize("name", ["mixture", "compiled"])
def test_two_ranks_that_visit_few_experts_or_compile_exchange_gradients_once_a_step(name: str, in_two: Path) -> None:
    """A joint mixture stopped at its second step: "Expected to have finished reduction in the prior iteration"."""
    found = torch.load(in_two / name / "found.pt", weights_only=True)
    assert found["count"] == joint_ranks.STEPS
    start = joint_ranks.job("mixture").model.state_dict()
    alone = joint_ranks.train("mixture", World()) if name == "mixture" else uncompiled()
    assert all(torch.allclose(found["weights"][key], alone[key], atol=1e-4) for key in alone)
    if name == "mixture":
        never = [key for key in alone if f".experts.{joint_ranks.NEVER_VISITED}." in key]
        assert never
        assert all(torch.equal(found["weights"][key], start[key]) for key in never)  # no gradient, and so no decay
        assert sum(not torch.equal(alone[key], start[key]) for key in alone) > len(alone) / 2


def uncompiled() -> dict[str, torch.Tensor]:
    """The weights of the compiled job, from one process that does not compile."""
    learns = joint_ranks.job("compiled")
    fit(learns, joint_ranks.OneTokenRows(), Job("plain", joint_ranks.PHASE, TrainingConfig()), lambda: 0.0, World())
    return learns.model.state_dict()
