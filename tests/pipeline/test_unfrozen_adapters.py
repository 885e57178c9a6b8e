"""LoRA experts that also train parts of the backbone: alone they run with their own, together with the mean."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import Artifact, write_artifact
from modularforge.assembly.shared import SHARED_NAME
from modularforge.calibration.calibrator import calibrate_as_set, write_calibrated
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.experts.lora import training
from modularforge.info import describe
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.run import Run
from modularforge.training.distributed import World
from modularforge.training.job import Job
from tests.conftest import tiny_config
from tests.lora_runs import WEIGHTS
from tests.pipeline.test_experts import beside

PARTS = ["embeddings", "head", "norms"]


def adapters_config(finished_run: Config, folder: Path, rounds: int = 1, **changes: Any) -> Config:
    lora = {"rank": 3, "alpha": 6.0, "targets": "both"}
    experts = {"kind": "lora", "anchored": False, "lora": lora, "unfreeze": PARTS, "rounds": rounds}
    assembly = {"router": "evidence", **changes.pop("assembly", {})}
    return beside(finished_run, folder, experts=experts, assembly=assembly, **changes)


def shared_of(artifact: Artifact) -> dict[str, Tensor]:
    return load_file(artifact.local_file(SHARED_NAME))


@pytest.fixture(scope="module")
def trained(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Adapters of three experts in two rounds, assembled; tests must not change it."""
    config = adapters_config(finished_run, tmp_path_factory.mktemp("unfrozen"), rounds=2)
    run = Run(config)
    for index in range(3):
        run.make("round_1", index)
    run.make("merge_1")
    for index in range(3):
        run.make("expert", index)
    run.make("assemble")
    return config


def test_the_model_has_the_mean_and_each_expert_its_own(trained: Config) -> None:
    run = Run(trained)
    experts = [run.require("expert", index) for index in range(3)]
    backbone, model = run.backbone.tensors, read_tensors(run.require("assemble").local_folder())
    each = [shared_of(expert) for expert in experts]
    assert {names.shared_part(name) for name in each[0]} == {"embeddings", "norms"}, "the head is tied"
    for name, tensor in backbone.items():
        if name in each[0]:
            mean = torch.stack([own[name].double() for own in each]).mean(dim=0)
            assert torch.allclose(model[name].double(), mean, rtol=1e-7, atol=0), name
            assert not torch.equal(model[name], tensor), name
        else:
            assert torch.equal(model[name], tensor), name
    own = run.backbone.expert(experts[1]).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in each[1].items())
    assert run.require("assemble").manifest.facts["shared_means"] == ["embeddings", "norms"]
    assert "are the mean of what each expert made of them" in run.require("assemble").read_bytes("README.md").decode()


def test_the_next_round_begins_with_what_was_merged_and_its_own_adapters(trained: Config) -> None:
    from modularforge.stages.expert import state_after

    run = Run(trained)
    state, merged = state_after(run, 0, 1), shared_of(run.require("merge_1"))
    assert all(torch.equal(state.tensors[f"weights.{name}"], tensor) for name, tensor in merged.items())
    others = {name for name in state.tensors if name.startswith("weights.")} - {f"weights.{name}" for name in merged}
    assert others
    assert all(".lora_" in name for name in others)


def test_one_expert_in_rounds_learns_what_it_learns_in_one(finished_run: Config, tmp_path: Path) -> None:
    found = []
    for rounds in (1, 3):
        run = Run(adapters_config(finished_run, tmp_path / str(rounds), rounds, cluster={"min_experts": 1}))
        for number in range(1, rounds):
            run.make(f"round_{number}", 1)
            run.make(f"merge_{number}")
        found.append(run.make("expert", 1))
    assert found[0].manifest.files == found[1].manifest.files


def test_the_average_and_the_soup_stand_beside_the_mean(trained: Config, tmp_path: Path) -> None:
    run = Run(trained)
    experts = [run.require("expert", index) for index in range(3)]
    soup = training.soup(run.backbone, experts)
    model = read_tensors(run.require("assemble").local_folder())
    assert all(torch.allclose(soup.state_dict()[name], model[name], atol=1e-6) for name in shared_of(experts[0]))
    settings = trained.assembly.model_copy(update={"lora": "average", "router": "uniform"})
    shutil.copytree(trained.output_dir, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("assembled"))
    averaged = Run(trained.model_copy(update={"assembly": settings, "output_dir": str(tmp_path / "run")}))
    averaged.make("assemble")
    assembled = load_model(averaged.require("assemble").local_folder())
    tokens_BT = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(assembled(tokens_BT), soup(tokens_BT), atol=1e-5)


def test_what_is_shared_is_tuned_after_assembly(trained: Config) -> None:
    changes = {"shared": True, "text": "training", "steps": 3, "batch_size": 2, "peak_learning_rate": 1e-3}
    calibration = trained.calibration.model_copy(update=changes)
    run = Run(trained.model_copy(update={"calibration": calibration}))
    run.make("calibrate")
    facts = run.require("calibrate").manifest.facts
    assert facts["loss_after"] != facts["loss_before"]


def test_what_they_train_is_said_beforehand(trained: Config) -> None:
    assert "parameters (embeddings, head, norms) that each expert trains too" in describe(trained)


def test_the_adapter_alone_has_no_shared_tensors(trained: Config) -> None:
    expert = Run(trained).require("expert", 0)
    assert all(".lora_" in name for name in load_file(expert.local_file(WEIGHTS)))


def test_adapters_are_tuned_together_and_each_is_stored_as_it_was_judged(trained: Config, tmp_path: Path) -> None:
    changes = {"adapters": True, "norms": False, "steps": 3, "batch_size": 2, "peak_learning_rate": 1e-3}
    config = trained.model_copy(update={"calibration": trained.calibration.model_copy(update=changes)})
    run = Run(config)
    assembled, job = run.require("assemble"), Job("calibrate", config.calibration, config.training, "0")
    model = load_model(assembled.local_folder())
    result = calibrate_as_set(model, config, run.corpus, run.require("partition"), job, World())
    assert not result.tensors
    assert {name.split(".")[-2] for each in result.adapters for name in each} == {"lora_A", "lora_B"}
    assert "switch" in result.beside
    with write_artifact(str(tmp_path / "calibrated"), "calibrated", "0") as writer:
        write_calibrated(assembled, result, writer, config.assembly.max_shard_bytes)
        stored, tokens_BT = load_model(writer.folder), torch.arange(2, 26).view(2, 12)
        with torch.no_grad():
            assert torch.equal(stored(tokens_BT), model(tokens_BT))
            assert not torch.equal(stored(tokens_BT), load_model(assembled.local_folder())(tokens_BT))
        for index in range(3):
            before = load_file(run.require("expert", index).local_file(WEIGHTS))
            after = load_file(next(writer.folder.glob(f"adapters/*{index}/{WEIGHTS}")))
            assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
            assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("kind", "form"), [("ffn", "adapters"), ("lora", "fold"), ("lora", "average")])
def test_adapters_are_tuned_where_there_are_some(kind: str, form: str, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "alpha": 2.0, "targets": "mlp"}} if kind == "lora" else {}
    router = "uniform" if form == "average" else "evidence"
    with pytest.raises(ConfigError, match=r"calibration\.adapters must be false where the assembled model has no"):
        tiny_config(
            tmp_path,
            experts={"kind": kind, "anchored": False, **lora},
            assembly={"lora": form, "router": router},
            calibration={"adapters": True},
        )
