"""Weights & Biases, MLflow and trackio as they are published, in the versions of constraints.txt.

Slow, as it installs them into an environment of its own: `make test-writers`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.environments import ROOT, environment_python

TOOLS = ("wandb", "mlflow-skinny", "trackio")
CONSTRAINTS = ROOT / "constraints.txt"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def python() -> Path:
    stamp = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()[:12]
    return environment_python("writers", stamp, "--constraint", str(CONSTRAINTS), *TOOLS)


def run(python: Path, folder: Path, *words: str) -> str:
    variables = {name: value for name, value in os.environ.items() if not re.match("WANDB|MLFLOW|TRACKIO", name)}
    variables |= {"TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_each_tool_reads_back_what_its_writer_told(python: Path, tmp_path: Path) -> None:
    tests = "tests/unit/test_metric_writers.py"
    said = run(python, tmp_path, "-m", "pytest", "-p", "no:cacheprovider", tests)
    assert "skipped" not in said, said
    assert "passed" in said


def test_a_training_tells_all_three_at_once_and_none_of_them_fails(python: Path, tmp_path: Path) -> None:
    words = ("--config", "configs/quickstart.yaml", "--smoke-test", "--output-dir", str(tmp_path / "run"))
    run(python, tmp_path, "-m", "modularforge", "prepare-data", *words)
    tools = ("--set", "metrics.writers=[wandb,mlflow,trackio]")
    said = run(python, tmp_path, "-m", "modularforge", "backbone", *words, *tools)
    assert "no longer gets the metrics" not in said
    metrics = tmp_path / "run" / "metrics"
    assert len([*(metrics / "wandb").glob("offline-run-*/*.wandb")]) == 1
    assert run(python, tmp_path, "-c", LIST_MLFLOW, str(metrics / "mlflow")).split() == ["run/backbone", "FINISHED"]
    (file,) = (tmp_path / "trackio").glob("modularforge*.db")
    assert file.stat().st_size > 0


LIST_MLFLOW = """
import os, sys
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow import MlflowClient
client = MlflowClient("file://" + sys.argv[1])
(one,) = [e for e in client.search_experiments() if e.name == "modularforge"]
for found in client.search_runs([one.experiment_id]):
    print(found.info.run_name, found.info.status)
"""
