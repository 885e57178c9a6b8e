"""The scripts in slurm/ as a person submits them: training, preempted too, the assembly, and the check of nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import open_artifact
from modularforge.config import Config
from tests.cluster.conftest import Launched
from tests.cluster.slurm import wait_for
from tests.cluster.test_recovery import LONG, TRAINING
from tests.conftest import ROOT

Make = Callable[..., Launched]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def submit(run: Launched, script: str, *options: str, **variables: str) -> str:
    """Submit a script by hand; its job id."""
    environment = {
        **run.cluster.environ, "CONFIG": str(run.config_file), "OUTPUT_DIR": str(run.folder),
        "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / f"{script}.log"
    words = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *options, f"slurm/{script}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_to_the_end(run: Launched, script: str, *options: str, **variables: str) -> tuple[str, str]:
    """Submit a script by hand and wait for its end; its state and its log."""
    job = submit(run, script, *options, **variables)
    wait_for(lambda: run.cluster.states(job)[0] in ENDED, f"{script} ends", 240)
    return run.cluster.states(job)[0], (run.folder / f"{script}.log").read_text()


def test_the_backbone_trains_by_hand_on_two_nodes(new_run: Make, finished_run: Config) -> None:
    run = new_run()
    shutil.copytree(Path(finished_run.output_dir) / "data", run.folder / "data")
    state, log = run_to_the_end(run, "train_backbone.sh", "--nodes=2")
    assert state == "COMPLETED", log
    mine, theirs = (open_artifact(f"{folder}/backbone").manifest for folder in (run.folder, finished_run.output_dir))
    assert mine.fingerprint == theirs.fingerprint
    assert mine.facts["validation_loss"] == pytest.approx(theirs.facts["validation_loss"], abs=1e-4)
    started = run.events("backbone", "started")
    assert [event["node_count"] for event in started] == [2]


def test_an_expert_by_hand_saves_its_state_when_preempted_and_goes_on(trained_run: Make) -> None:
    run = trained_run(experts={**LONG, "steps": 5000}, training=TRAINING)  # not over before it is preempted
    job = submit(run, "train_experts.sh", "--array=0", "--partition=preemptible")
    run.wait_for_step("expert-0", 40)
    assert run.rows()["expert-0"]["state"] == "running"
    assert "expert-0: srun" in run.launcher("logs", "expert", "0"), "wherever sbatch was told to write it"
    run.cluster.preempt()
    wait_for(lambda: len(run.events("expert-0", "started")) == 2, f"job {job} starts again")
    (requeued,) = run.events("expert-0", "requeued")
    assert requeued["reason"] == "preempted"
    assert run.events("expert-0", "started")[1]["step"] == requeued["step"] >= 40


def test_the_model_is_assembled_and_evaluated_by_hand(trained_run: Make, finished_run: Config) -> None:
    """Without CONFIG, by the run's own settings: those of configs/default.yaml would be refused."""
    run = trained_run()
    shutil.copytree(Path(finished_run.output_dir) / "experts", run.folder / "experts")
    shutil.copy(run.config_file, run.folder / "config.yaml")
    state, log = run_to_the_end(run, "assemble.sh", EVALUATE="yes", CONFIG="")
    assert state == "COMPLETED", log
    for name in ("assembled", "calibrated"):
        mine, theirs = (open_artifact(f"{folder}/{name}").manifest for folder in (run.folder, finished_run.output_dir))
        assert mine.files == theirs.files, name
    assert run.has("evaluation")


@pytest.mark.parametrize("is_broken", [False, True], ids=["good settings", "missing data"])
def test_nodes_are_checked_by_hand(is_broken: bool, new_run: Make) -> None:
    """Two nodes that add up numbers over the network, then model, data and a short training on the first."""
    run = new_run()
    if is_broken:
        for source in run.values["data"]["sources"]:
            source["train"] = "/nowhere/*.txt"
    state, log = run_to_the_end(run, "sanity.sh", "--nodes=2", QUICK="yes")
    assert state == ("FAILED" if is_broken else "COMPLETED"), log
    assert "2 processes reach each other" in log
    assert ("all is well" in log) == (not is_broken)
    assert ("/nowhere" in log) == is_broken, "a failure tells its cause"
