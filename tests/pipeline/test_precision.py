"""bf16 and torch.compile are settings of the same loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import paths
from modularforge.config import Config
from modularforge.pipeline import metrics_url
from modularforge.run import Run
from modularforge.stages import backbone, expert
from tests.conftest import tiny_config


def losses(config: Config, job: str) -> list[float]:
    rows = [json.loads(line) for line in paths.read_bytes(metrics_url(config, job)).decode().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


COMPILED = pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow)  # minutes of compilation on a CPU


@pytest.mark.parametrize("change", [pytest.param({"precision": "bf16"}, id="bf16"), COMPILED])
def test_backbone_and_expert_train_to_nearly_the_same_losses(
    change: dict[str, object], finished_run: Config, tmp_path: Path
) -> None:
    training = {**finished_run.training.model_dump(), **change}
    config = tiny_config(tmp_path / "run", data_dir=finished_run.data_url, training=training)
    backbone.run(Run(config))
    expert.run(Run(config), 0)
    for job in ("backbone", "expert-0"):
        assert losses(config, job) == pytest.approx(losses(finished_run, job), abs=0.02)
    entries = Run(config).require("backbone").manifest.files["model.safetensors"].tensors
    assert entries.keys() == Run(finished_run).require("backbone").manifest.files["model.safetensors"].tensors.keys()
