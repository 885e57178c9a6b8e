"""The baselines of an evaluation: trained when they are asked for, and measured beside the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from checkpoints import paths
from modularforge.config import Config
from modularforge.model.folder import load_model
from modularforge.settings import to_yaml
from tests.conftest import run_command


@pytest.fixture(scope="module")
def evaluated(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated with all baselines in a folder of its own."""
    folder = tmp_path_factory.mktemp("baselines") / "run"
    folder.mkdir(parents=True)
    for name in ("backbone", "experts", "assembled", "calibrated"):
        (folder / name).symlink_to(paths.local_path(finished_run.output_dir) / name)
    values = yaml.safe_load(to_yaml(finished_run))
    values |= {"output_dir": str(folder), "data_dir": finished_run.data_url}
    values["evaluation"]["baselines"] = ["dense", "soup", "joint", "btx"]
    values["joint"]["batch_size"] = 2 * finished_run.experts.batch_size
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    run_command("modularforge", "evaluate", "--config", str(config))
    return folder


def test_all_baselines_are_in_the_table(evaluated: Path) -> None:
    results = json.loads((evaluated / "evaluation" / "results.json").read_text())
    models = results["models"]
    assert {"dense", "joint", "soup", "btx"} <= models.keys()
    assert models["btx"]["mean_loss"] < models["backbone"]["mean_loss"]
    assert models["joint"]["training_tokens"] == models["dense"]["training_tokens"]
    assert models["joint"]["parameters"] == models["assembled"]["parameters"]
    assert models["joint"]["active_parameters"] == models["assembled"]["active_parameters"]


def test_a_joint_model_gives_the_logits_of_transformers(evaluated: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = evaluated / "baselines" / "joint"
    tokens_BT = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens_BT).logits
        torch.testing.assert_close(load_model(folder)(tokens_BT), theirs, atol=1e-5, rtol=1e-4)
