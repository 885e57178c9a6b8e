"""The whole pipeline on object storage gives the same bytes as on a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import paths
from modularforge.config import Config
from modularforge.pipeline import metrics_url
from modularforge.run import Run
from modularforge.stages import evaluate
from tests.conftest import run_command, run_every_stage, tiny_config

STAGES: list[tuple[str, int | None]] = [
    *((stage, None) for stage in ("prepare-data", "partition", "backbone", "dense", "assemble", "calibrate")),
    *(("expert", index) for index in range(3)),
]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_run_on_an_object_store_equals_one_on_a_folder(
    kind: str, finished_run: Config, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue("s3") if kind == "s3" else "memory://pipeline-test"
    config = tiny_config(f"{root}/run")
    results = run_every_stage(config)
    for name, index in STAGES:
        assert (
            Run(config).require(name, index).manifest.files == Run(finished_run).require(name, index).manifest.files
        ), name
    expected = Run(finished_run).require("backbone").manifest.facts["validation_loss"]
    assert Run(config).require("backbone").manifest.facts["validation_loss"] == expected
    lines = paths.read_bytes(metrics_url(config, "backbone")).splitlines()
    assert json.loads(lines[-1])["step"] == config.backbone.steps
    assert results["models"]["assembled"]["mean_loss"] > 0
    again = evaluate.run(Run(config))
    assert again == results


def test_a_run_that_went_through_object_storage_can_be_reported(finished_run: Config, s3: str, tmp_path: Path) -> None:
    """Pushed and pulled again, a run has its curves and settings, not only its artifacts."""
    copy = tmp_path / "run"
    run_command("checkpoints", "push", finished_run.output_dir, f"{s3}/run")
    run_command("checkpoints", "pull", f"{s3}/run", str(copy))
    run_command("checkpoints", "verify", str(copy))
    for name in ("config.yaml", "metrics/backbone.jsonl"):
        assert (copy / name).read_bytes() == (Path(finished_run.output_dir) / name).read_bytes()
    run_command("modularforge", "report", str(copy))
    assert "validation loss" in (copy / "report.html").read_text()
