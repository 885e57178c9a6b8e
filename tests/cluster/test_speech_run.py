"""A speech run on Slurm: by the scripts in slurm/ and by the launcher, with the projector on two nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import open_artifact
from modularforge.run import Run
from tests.cluster.conftest import NODES, Launched
from tests.cluster.slurm import Cluster
from tests.cluster.test_scripts import run_to_the_end
from tests.speech.runs import run_all, speech_config

JOBS = ("prepare-data", "backbone", "expert", "assemble", "evaluate")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that is finished here."""
    folder = tmp_path_factory.mktemp("speech")
    config = speech_config(folder / "here", folder / "sounds", evaluation={"baselines": []}, cluster=NODES)
    run_all(config)
    return config.model_dump(mode="json")


def check(run: Launched, values: dict[str, Any]) -> None:
    """Losses on other nodes are those from here but for rounding, and every stage is finished."""
    for name in ("backbone", "experts/expert-0", "experts/expert-1"):
        mine, theirs = (open_artifact(f"{folder}/{name}").manifest for folder in (run.folder, values["output_dir"]))
        assert mine.facts["validation_loss"] == pytest.approx(theirs.facts["validation_loss"], abs=2e-3), name
    assert Run(run.config).require("assemble").manifest.facts["experts"] == 2
    assert run.has("evaluation")
    assert [event["node_count"] for event in run.events("backbone", "started")] == [2]


@pytest.mark.slow
def test_a_speech_run_goes_through_the_scripts(cluster: Cluster, values: dict[str, Any], tmp_path: Path) -> None:
    here = Path(values["output_dir"])
    run = Launched(cluster, {**values, "output_dir": str(tmp_path / "run"), "data_dir": str(here / "data")})
    for script, options, variables in (
        ("train_backbone.sh", ["--nodes=2"], {}),
        ("train_experts.sh", ["--array=0-1"], {}),
        ("assemble.sh", [], {"EVALUATE": "yes"}),
    ):
        state, log = run_to_the_end(run, script, *options, **variables)
        assert state == "COMPLETED", log
    check(run, values)


@pytest.mark.slow
def test_a_speech_run_is_launched(cluster: Cluster, values: dict[str, Any], tmp_path: Path) -> None:
    run = Launched(cluster, {**values, "output_dir": str(tmp_path / "run")})
    run.submit()
    run.launcher("wait")
    assert tuple(item["group"] for item in run.submissions()) == JOBS
    check(run, values)
    assert "finished; nothing to do" in run.submit()
