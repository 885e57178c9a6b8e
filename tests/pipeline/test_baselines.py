"""The baselines of an evaluation: trained when they are asked for, and measured beside the others."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml

from checkpoints import paths
from modularforge.config import Config
from modularforge.config_files import make_config, to_yaml
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.hub_config import read_config
from modularforge.model.moe import moe_layers, observe_routing
from modularforge.model.upcycling import widened
from modularforge.pipeline import stage_settings
from modularforge.tasks.text import TEXT
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
    values["evaluation"]["baselines"] = ["dense", "dense_wide", "soup", "joint", "joint_evidence", "btx"]
    values["joint"]["batch_size"] = 2 * finished_run.experts.batch_size
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    run_command("modularforge", "evaluate", "--config", str(config))
    return folder


def test_all_baselines_are_in_the_table(evaluated: Path) -> None:
    results = json.loads((evaluated / "evaluation" / "results.json").read_text())
    models = results["models"]
    assert {"dense", "dense_wide", "joint", "joint_evidence", "soup", "btx"} <= models.keys()
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


def test_a_wide_backbone_computes_the_same_and_its_copies_differ(evaluated: Path) -> None:
    values, tensors = read_config(evaluated / "backbone"), read_tensors(evaluated / "backbone")
    torch.manual_seed(0)
    plain, wide = load_model(evaluated / "backbone"), widened(tensors, values, 3).whole()
    tokens_BT = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(wide(tokens_BT), plain(tokens_BT), atol=1e-5, rtol=1e-5)
    up_FD = wide.get_parameter(names.dense_ffn(1, "w3")).detach().chunk(3)
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(up_FD, 2)) > 1e-3
    gate_FD = wide.get_parameter(names.dense_ffn(1, "w1"))
    TEXT.loss(wide, {"inputs": tokens_BT, "targets": tokens_BT}).backward()
    assert gate_FD.grad is not None
    steps_FD = gate_FD.grad.sign().chunk(3)  # of AdamW's first step
    assert not torch.equal(steps_FD[0], steps_FD[1]), "equal steps would leave the copies equal for good"
    assert torch.equal(
        tensors[names.dense_ffn(1, "w3")], read_tensors(evaluated / "backbone")[names.dense_ffn(1, "w3")]
    )


def test_the_wide_dense_model_has_the_active_parameters_of_the_assembled_one(evaluated: Path) -> None:
    models = json.loads((evaluated / "evaluation" / "results.json").read_text())["models"]
    wide, assembled = models["dense_wide"], models["assembled"]
    assert wide["active_parameters"] == assembled["active_parameters"] - assembled["routing_parameters"]
    assert wide["routing_parameters"] == models["dense"]["routing_parameters"] == 0
    assert wide["training_tokens"] == models["dense"]["training_tokens"]
    assert wide["mean_loss"] < models["backbone"]["mean_loss"]


def test_a_wide_dense_model_gives_the_logits_of_transformers(evaluated: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = evaluated / "baselines" / "dense_wide"
    tokens_BT = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens_BT).logits
        torch.testing.assert_close(load_model(folder)(tokens_BT), theirs, atol=1e-5, rtol=1e-4)


def test_a_rate_of_its_own_trains_another_model_and_the_general_one_the_same(evaluated: Path, tmp_path: Path) -> None:
    """The very artifact, whether the rate is said for all trainings or for the baseline alone."""
    values = yaml.safe_load((evaluated / "config.yaml").read_text())
    values["output_dir"] = str(tmp_path / "run")
    ours = make_config({**values, "dense": {"peak_learning_rate": 7e-3, "batch_size": 12}}, "here")
    general = make_config(
        {**values, "experts": values["experts"] | {"peak_learning_rate": 7e-3}, "joint": {"batch_size": 12}}, "here"
    )
    plain = make_config(values, "here")
    assert stage_settings(ours, "dense") == stage_settings(general, "dense") != stage_settings(plain, "dense")
    assert stage_settings(ours, "joint") == stage_settings(plain, "joint")
    assert stage_settings(ours, "dense_wide") == stage_settings(plain, "dense_wide")
    assert ours.baseline_phase("dense") == general.baseline_phase("dense")
    assert ours.baseline_phase("dense").peak_learning_rate == 7e-3
    assert ours.baseline_phase("dense").batch_size == 12
    assert ours.baseline_phase("joint") == plain.baseline_phase("joint")


def test_a_mixture_that_is_routed_by_evidence_trains_experts_and_no_router(evaluated: Path) -> None:
    folder = evaluated / "baselines" / "joint_evidence"
    model, backbone = load_model(folder), read_tensors(evaluated / "backbone")
    assert model.text_router is not None
    observe_routing(model)
    tokens_BT = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        model(tokens_BT)
        logits_BTE, _ = model.text_router(tokens_BT)
    for layer in moe_layers(model):
        assert layer.observed_logits is not None
        torch.testing.assert_close(layer.observed_logits, logits_BTE.flatten(0, 1))
    trained = read_tensors(folder)
    assert not any(tensor.any() for name, tensor in trained.items() if names.is_gate(name))
    downs = [trained[names.expert_ffn(1, slot, "w2")] for slot in range(len(moe_layers(model)[0].experts))]
    assert all(not torch.equal(down, backbone[names.dense_ffn(1, "w2")]) for down in downs)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(downs, 2))
    models = json.loads((evaluated / "evaluation" / "results.json").read_text())["models"]
    assert models["joint_evidence"]["mean_loss"] < models["backbone"]["mean_loss"]
    assert models["joint_evidence"]["training_tokens"] == models["joint"]["training_tokens"]
