"""Rounds on Slurm: a merge between arrays, each task after its own of the round before, and one expert that fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints import open_artifact
from modularforge.config import Config
from tests.cluster.conftest import NODES, Launched
from tests.cluster.slurm import Cluster
from tests.conftest import tiny_values


@pytest.fixture
def run(cluster: Cluster, finished_run: Config, tmp_path: Path) -> Launched:
    """Data and backbone are finished, and the partition of expert 1 is broken."""
    values = tiny_values(
        tmp_path / "run",
        experts={"anchored": False, "unfreeze": ["norms", "attention"], "rounds": 2},
        assembly={"router": "ridge"},
        evaluation={"baselines": []},
        cluster={**NODES, "min_experts": 2, "max_crashes": 0, "straggler_minutes": 60},
    )
    for name in ("data", "backbone"):
        shutil.copytree(Path(finished_run.output_dir) / name, tmp_path / "run" / name)
    (tmp_path / "run/data/partitions/partition-1.tokens.bin").write_bytes(b"broken")
    return Launched(cluster, values)


def test_a_failed_expert_is_left_out_of_the_merge_and_of_the_model(run: Launched, finished_run: Config) -> None:
    run.submit()
    assert [item["group"] for item in run.submissions()] == ["round_1", "merge_1", "expert", "assemble", "evaluate"]
    array, merge = run.job("round_1"), run.job("merge_1")
    scripts = {path.name.split("-")[1]: path.read_text() for path in run.folder.glob("cluster/**/scripts/*.sh")}
    assert f"--dependency='afterany:{array}?after:{array}+60'" in scripts["merge_1"]
    assert f"--dependency=afterok:{merge},aftercorr:{array}" in scripts["expert"]
    run.launcher("wait")
    merged = open_artifact(str(run.folder / "rounds/merge_1")).manifest
    assert (merged.facts["merged"], merged.facts["late"]) == ([0, 2], [1])
    assert set(open_artifact(str(run.folder / "assembled")).manifest.inputs) == {"backbone", "expert-0", "expert-2"}
    rows = run.rows()
    assert {rows[name]["state"] for name in ("round_1-1", "expert-1")} == {"left out"}
    assert not run.events("expert-1"), "it was never started"
    assert "finished; nothing to do" in run.submit()
