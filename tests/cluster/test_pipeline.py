"""The whole pipeline on four nodes, with the backbone's DDP on two of them: the same weights as here, and no traces."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoints import open_artifact
from launcher.processes import LocalLauncher
from launcher.tasks import build_tasks
from tests.cluster.conftest import NODES, Launched
from tests.cluster.slurm import Cluster
from tests.conftest import ROOT, tiny_values

SECRET = "do-not-show-this-anywhere"
STAGES = ("prepare-data", "backbone", "expert", "assemble", "evaluate")


@dataclass
class Finished(Launched):
    """A run that was launched with the preflight and waited for, and what both commands printed."""

    output: str = ""
    waited: str = ""


@pytest.fixture(scope="module")
def finished(session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pipeline")
    values = tiny_values(
        folder / "run", evaluation={"baselines": []}, cluster=NODES, launcher={"backbone_processes": 2}
    )
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET, "MY_PASSWORD": SECRET, "RANK": "3", "MASTER_ADDR": "elsewhere"}
    run = Finished(session_cluster, values, environment)
    run.output = run.launcher("--cluster")
    run.waited = run.launcher("wait")
    return run


def test_the_weights_are_those_of_the_local_launcher(finished: Finished, tmp_path: Path) -> None:
    here = Launched(finished.cluster, {**finished.values, "output_dir": str(tmp_path / "local")})
    shutil.copytree(finished.folder / "data", here.folder / "data")
    chosen = ("prepare-data", "backbone", "expert-1")  # of three alike
    training = [task for task in build_tasks(here.config) if str(task.job) in chosen]
    assert len(training) == len(chosen)
    LocalLauncher(here.config, training, print).run()
    for folder in ("backbone", "experts/expert-1"):
        files, same = (open_artifact(str(run.folder / folder)).manifest.files for run in (finished, here))
        weights = {name for name in files if name.endswith(".safetensors")}
        assert weights
        assert {name: files[name].digest for name in weights} == {name: same[name].digest for name in weights}, folder


def test_the_preflight_tried_a_node(finished: Finished) -> None:
    assert "on a node: python 3" in finished.output


def test_every_stage_is_one_submission(finished: Finished) -> None:
    assert [item["group"] for item in finished.submissions()] == list(STAGES)


def test_run_again_does_nothing(finished: Finished) -> None:
    assert "finished; nothing to do" in finished.launcher("--cluster")
    assert len(finished.submissions()) == len(STAGES)


def test_wait_tells_the_end_report(finished: Finished) -> None:
    report = {line.split()[0]: line.split() for line in finished.waited.splitlines() if line.startswith(STAGES)}
    assert report["expert"][1] == "3"
    assert report["backbone"][-1].endswith("%")
    kept = json.loads((finished.folder / "cluster" / "report.json").read_text())
    assert {row["stage"] for row in kept} == set(STAGES)


def test_the_events_of_all_jobs_are_in_one_file(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.folder / "jobs.jsonl").read_text().splitlines()]
    for job in ("prepare-data", "backbone", "expert-0", "expert-1", "expert-2", "assemble", "evaluate"):
        assert [line["event"] for line in lines if line["job"] == job] == ["submitted", "started", "ended"], job


def test_status_shows_all_committed_with_step_loss_and_checkpoint(finished: Finished) -> None:
    rows = finished.rows()
    assert {row["state"] for row in rows.values()} == {"committed"}
    assert rows["expert-1"]["step"] == rows["expert-1"]["steps"] == 10
    assert rows["expert-1"]["loss"] > 0
    assert rows["expert-1"]["age"] > 0
    assert Path(rows["expert-1"]["log"]).is_file()
    assert "expert-2" in finished.launcher("status")
    assert "goodput" in finished.launcher("status", "--watch"), "it ends when nothing goes on, with the report"


def test_logs_prints_the_log_of_a_job(finished: Finished) -> None:
    assert "finished: " in finished.launcher("logs", "expert/1")
    assert "'expert/9' is none; there are prepare-data" in finished.launcher("logs", "expert/9", code=2)


def test_code_and_settings_are_frozen_and_recorded(finished: Finished) -> None:
    frozen = list((finished.folder / "cluster" / "frozen").iterdir())
    assert len(frozen) == 1
    assert (frozen[0] / "launcher" / "node.py").read_text() == (ROOT / "launcher" / "node.py").read_text()
    provenance = open_artifact(str(finished.folder / "experts" / "expert-0")).manifest.facts["provenance"]
    assert provenance["config"]["cluster"]["backbone"]["nodes"] == 2
    assert provenance["versions"]["torch"]
    recorded = json.loads((frozen[0] / "frozen.json").read_text())
    assert {name: provenance[name] for name in ("commit", "uncommitted_sha256")} == recorded


def test_no_secret_is_in_scripts_logs_or_what_slurm_shows(finished: Finished) -> None:
    shown = finished.cluster.run("scontrol", "show", "job")
    written = [path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()]
    assert not [text for text in [shown.encode(), *written] if SECRET.encode() in text]


def test_changed_settings_are_refused_with_the_difference(finished: Finished) -> None:
    said = finished.launcher("--cluster", "--set", "experts.peak_learning_rate=0.5", code=2)
    assert "experts.peak_learning_rate: 0.001 in the run, 0.5 now" in said
    assert "--new-run" in said


def test_a_dry_run_prints_all_scripts_and_touches_nothing(finished: Finished, tmp_path: Path) -> None:
    finished_environment, finished.environment = finished.environment, {"SLURM_CONF": "/nowhere", "PATH": "/nowhere"}
    try:
        said = finished.launcher("plan", "-o", str(tmp_path / "planned"), "--set", "cluster.expert.gpus=2")
    finally:
        finished.environment = finished_environment
    assert said.count("#!/bin/bash") == len(STAGES)
    assert "#SBATCH --gpus-per-node=2" in said
    assert "at most 6.0 GPU-hours" in said
    assert not (tmp_path / "planned").exists()
