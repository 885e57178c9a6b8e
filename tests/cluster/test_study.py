"""A study hands its runs to the launcher: trained on nodes, shared where they are alike, measured here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import NODES
from tests.cluster.slurm import Cluster
from tests.conftest import ROOT, tiny_values


@pytest.mark.slow
def test_the_runs_of_a_study_train_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    base, study = tmp_path / "base.yaml", tmp_path / "study.yaml"
    values = tiny_values(tmp_path / "unused", cluster=NODES, assembly={"router": "ridge"}, experts={"count": 2})
    values |= {"partition": {"method": "domain"}, "data": {**values["data"], "sources": values["data"]["sources"][:2]}}
    base.write_text(yaml.safe_dump(values))
    content = {
        "name": "tiny",
        "base": str(base),
        "output_dir": str(tmp_path / "out"),
        "set": {"experts.anchored": False},
        "recipes": {"plain": {}, "frozen": {"joint.freeze_shared": True}},
        "variants": {
            "backbone": {"kind": "backbone"},
            "experts": {"kind": "experts"},
            "btx": {"kind": "btx"},
            "joint": {"kind": "joint", "recipe": "frozen"},
        },
    }
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    words = [sys.executable, "-m", "modularforge", "study", str(study), "--cluster"]
    environment = {**cluster.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "out" / "seed-0"
    for job in ("plain/branch", "plain/expert", "plain/backbone", "frozen/joint"):
        assert f"{job.split('/')[1]}: submitted as job" in done.stdout
        assert list((root / job.split("/")[0] / "metrics").glob(f"{job.split('/')[1]}*.jsonl")), job
    trained = sorted(path.stem for path in (root / "frozen" / "metrics").glob("*.jsonl"))
    assert "joint" in trained
    assert not any(name.startswith(("backbone", "expert")) for name in trained), "these are the other run's"
    assert "| btx | 1 |" in (tmp_path / "out" / "table-validation.md").read_text()
