"""`python -m launcher` on this machine goes on without an expert, or not, as `cluster.min_experts` says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoints import open_artifact
from launcher.events import read_events
from modularforge.config import Config
from modularforge.config_files import make_config
from tests.conftest import ROOT, run_command, tiny_values


class Run:
    """A run whose data, backbone and experts 0 and 2 are finished; the partition of expert 1 is broken."""

    def __init__(self, folder: Path, finished_run: Config) -> None:
        self.folder, self.finished = folder, Path(finished_run.output_dir)
        self.changes: dict[str, Any] = {}
        for name in ("data", "backbone", "experts/expert-0", "experts/expert-2"):
            shutil.copytree(self.finished / name, folder / name)
        self.partition.write_bytes(b"broken")

    @property
    def partition(self) -> Path:
        return self.folder / "data" / "partitions" / "partition-1.tokens.bin"

    def values(self, min_experts: int | None) -> dict[str, object]:
        more = {"evaluation": {"baselines": []}, "cluster": {"min_experts": min_experts}, **self.changes}
        return tiny_values(self.folder, **more)

    def launch(self, min_experts: int | None) -> subprocess.CompletedProcess[str]:
        """Launch it as a user does."""
        return run_command("launcher", "--config", self.settings(min_experts), check=False)

    def settings(self, min_experts: int | None) -> str:
        """Its settings as a file."""
        path = self.folder.with_name("settings.yaml")
        path.write_text(yaml.safe_dump(self.values(min_experts)))
        return str(path)

    def experts(self) -> list[str]:
        """Experts of the assembled model."""
        return sorted(set(open_artifact(str(self.folder / "assembled")).manifest.inputs) - {"backbone"})

    def starts(self, job: str) -> int:
        """How often a job was started."""
        events = read_events(make_config(self.values(None), "tests"), job)
        return sum(event["event"] == "started" for event in events)


@pytest.fixture
def run(finished_run: Config, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", finished_run)


def test_a_failed_expert_stops_the_assembly_but_no_other_expert(run: Run) -> None:
    shutil.rmtree(run.folder / "experts" / "expert-2")
    done = run.launch(None)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "expert-1 must end with code 0, but ended with" in done.stderr
    assert "partition-1.tokens.bin" in done.stderr, "the end of the log says why"
    assert "not started for that reason: assemble, evaluate" in done.stderr
    assert (run.folder / "experts" / "expert-2" / "manifest.json").is_file()
    assert not (run.folder / "assembled").exists()


def test_min_experts_lets_the_model_go_on_without_one(run: Run) -> None:
    done = run.launch(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "expert-1: ended with code" in done.stdout
    assert run.experts() == ["expert-0", "expert-2"]
    assert open_artifact(str(run.folder / "assembled")).manifest.facts["experts"] == 3, "the public FFN and two experts"
    assert "calibrated" in done.stdout, "the table is printed"
    assert "expert-1 " not in (run.folder / "evaluation" / "report.md").read_text()

    again = run.launch(2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "expert-1: left out (cluster.min_experts)" in again.stdout
    assert run.starts("expert-1") == 1, "it is not tried again while nobody wants it"


def test_wanting_the_missing_expert_after_all_trains_it_and_assembles_again(run: Run) -> None:
    run_command("modularforge", "assemble", "--config", run.settings(2))  # its process holds the lock of the metrics
    assert run.experts() == ["expert-0", "expert-2"]
    shutil.copyfile(run.finished / "data" / "partitions" / run.partition.name, run.partition)
    done = run.launch(None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.experts() == ["expert-0", "expert-1", "expert-2"]
    for name in ("experts/expert-1", "assembled", "calibrated"):
        files = open_artifact(str(run.folder / name)).manifest.files
        assert files == open_artifact(str(run.finished / name)).manifest.files, name
    assert_record_events_and_logs_are_as_on_a_cluster(run)


def assert_record_events_and_logs_are_as_on_a_cluster(run: Run) -> None:
    """After expert 1 was trained, and the model made and evaluated."""
    record = json.loads((run.folder / "cluster" / "run.json").read_text())
    assert [(item["group"], item["indices"]) for item in record["submissions"]] == [
        ("expert", [1]),
        ("assemble", []),
        ("evaluate", []),
    ]
    lines = [json.loads(line) for line in (run.folder / "jobs.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["job"] == "expert-1"] == ["submitted", "started", "ended"]
    assert [line["slurm_job"] for line in lines if line["job"] == "expert-1"] == ["local-1", "local-1_1", "local-1_1"]
    assert {row["state"] for row in rows(run).values()} == {"committed"}
    assert "finished: " in launcher(run, "logs", "expert/1")
    assert "goodput" in launcher(run, "wait")
    kept = json.loads((run.folder / "cluster" / "report.json").read_text())
    assert {row["stage"] for row in kept} == {"expert", "assemble", "evaluate"}
    assert "all jobs have ended" in launcher(run, "cancel")
    run.launch(None)  # which has nothing left to do but the evaluation
    assert launcher(run, "logs", "calibrated") == launcher(run, "logs", "assemble"), "a job by what it makes"
    assert "finished: " in launcher(run, "logs", "expert/1"), "an earlier launch keeps its logs"


def launcher(run: Run, *arguments: str, code: int = 0) -> str:
    """A command of the launcher on this run; what it printed."""
    done = run_command("launcher", *arguments, "--config", run.settings(None), check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(run: Run) -> dict[str, dict[str, Any]]:
    """What `status --json` says, by job."""
    return {row["task"]: row for row in json.loads(launcher(run, "status", "--json"))}


@contextmanager
def running(run: Run, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher as another shell runs it, once expert 1 is training."""
    command = [sys.executable, "-m", "launcher", *words, "--config", run.settings(None)]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: (run.folder / "metrics" / "expert-1.jsonl").exists(), log)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object], log: Path, seconds: float = 120.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture
def whole(run: Run) -> Run:
    """The run with a sound partition for expert 1, which trains for long."""
    shutil.copyfile(run.finished / "data" / "partitions" / run.partition.name, run.partition)
    shutil.rmtree(run.folder / "experts")
    run.changes = {"experts": {"steps": 3000}, "launcher": {"max_workers": 2}}
    return run


def test_another_shell_sees_and_cancels_a_run(whole: Run, tmp_path: Path) -> None:
    with running(whole, tmp_path / "log") as process:
        found = rows(whole)
        assert found["backbone"]["state"] == "committed"
        assert found["expert-1"]["state"] == "running"
        assert found["expert-2"]["state"] == "pending"
        assert found["assemble"]["state"] == "pending"
        assert f"process id {process.pid}" in launcher(whole, "resume", code=2), "it is running already"
        assert "all jobs have ended" in launcher(whole, "cancel")
        assert process.wait(60) == 130
    found = rows(whole)
    assert found["expert-1"]["state"] == "cancelled"
    assert found["expert-1"]["checkpoint_step"] > 0, "its state was saved"
    launcher(whole, "wait", code=1)


def test_a_launcher_that_was_killed_is_seen_and_resume_goes_on_from_the_checkpoints(whole: Run, tmp_path: Path) -> None:
    with running(whole, tmp_path / "log") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert "all jobs have ended" in launcher(whole, "cancel")
    found = rows(whole)
    assert found["expert-1"]["state"] in ("cancelled", "failed")
    assert found["expert-1"]["checkpoint_step"] > 0, "its state was saved when the launcher was gone"
    assert found["assemble"]["state"] == "cancelled"
    with running(whole, tmp_path / "log", "resume"):
        wait_for(lambda: whole.starts("expert-1") == 2, tmp_path / "log")
        assert read_events(make_config(whole.values(None), "tests"), "expert-1")[-1]["step"] > 0


def test_a_training_that_was_killed_starts_again_as_on_a_cluster(whole: Run, tmp_path: Path) -> None:
    with running(whole, tmp_path / "log") as process:
        node = next(event for event in read_events(make_config(whole.values(None), "tests"), "expert-1"))["pid"]
        child = int(Path(f"/proc/{node}/task/{node}/children").read_text().split()[0])
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: whole.starts("expert-1") == 2, tmp_path / "log")
        assert "expert-1: starts again (crashed)" in (tmp_path / "log").read_text()
        assert rows(whole)["expert-1"]["requeues"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
