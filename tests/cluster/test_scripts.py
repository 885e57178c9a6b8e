"""The scripts in slurm/ as a person submits them: the backbone on two nodes, the assembly, and the check of nodes."""

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
from tests.conftest import ROOT

Make = Callable[..., Launched]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def sbatch(run: Launched, script: str, *options: str, seconds: float = 240.0, **variables: str) -> tuple[str, str]:
    """Submit a script by hand and wait for its end; its state and its log."""
    environment = {
        **run.cluster.environ, "CONFIG": str(run.config_file), "OUTPUT_DIR": str(run.folder),
        "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    log = run.folder / f"{script}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *options, f"slurm/{script}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_for(lambda: run.cluster.states(job)[0] in ENDED, f"{script} ends", seconds)
    return run.cluster.states(job)[0], log.read_text()


def test_the_backbone_trains_by_hand_on_two_nodes(new_run: Make, finished_run: Config) -> None:
    run = new_run()
    shutil.copytree(Path(finished_run.output_dir) / "data", run.folder / "data")
    state, log = sbatch(run, "train_backbone.sh", "--nodes=2")
    assert state == "COMPLETED", log
    mine, theirs = (open_artifact(f"{folder}/backbone").manifest for folder in (run.folder, finished_run.output_dir))
    assert mine.fingerprint == theirs.fingerprint
    assert mine.facts["validation_loss"] == pytest.approx(theirs.facts["validation_loss"], abs=1e-4)
    started = run.events("backbone", "started")
    assert [event["node_count"] for event in started] == [2]


def test_the_model_is_assembled_and_evaluated_by_hand(trained_run: Make, finished_run: Config) -> None:
    run = trained_run()
    shutil.copytree(Path(finished_run.output_dir) / "experts", run.folder / "experts")
    state, log = sbatch(run, "assemble.sh", EVALUATE="yes")
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
    state, log = sbatch(run, "sanity.sh", "--nodes=2", QUICK="yes")
    assert state == ("FAILED" if is_broken else "COMPLETED"), log
    assert "2 processes reach each other" in log
    assert ("all is well" in log) == (not is_broken)
    assert ("/nowhere" in log) == is_broken, "a failure tells its cause"
