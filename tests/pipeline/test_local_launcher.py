"""`python -m launcher` on this machine goes on without an expert, or not, as `cluster.min_experts` says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from checkpoints import open_artifact
from launcher.events import read_events
from modularforge.config import Config
from modularforge.settings import make_config
from tests.conftest import run_command, tiny_values


class Run:
    """A run whose data, backbone and experts 0 and 2 are finished; the partition of expert 1 is broken."""

    def __init__(self, folder: Path, finished_run: Config) -> None:
        self.folder, self.finished = folder, Path(finished_run.output_dir)
        for name in ("data", "backbone", "experts/expert-0", "experts/expert-2"):
            shutil.copytree(self.finished / name, folder / name)
        self.partition.write_bytes(b"broken")

    @property
    def partition(self) -> Path:
        return self.folder / "data" / "partitions" / "partition-1.tokens.bin"

    def values(self, min_experts: int | None) -> dict[str, object]:
        return tiny_values(self.folder, evaluation={"baselines": []}, cluster={"min_experts": min_experts})

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
