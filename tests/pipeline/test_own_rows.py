"""`assembly.shared: own`: each expert keeps its embeddings and head, and tokens visit them as they visit its block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import Artifact
from modularforge import cost, edit_experts
from modularforge.assembly.shared import SHARED_NAME
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError
from modularforge.evaluation.bench import sizes_of
from modularforge.evaluation.generation import Sampling, continue_batch, continue_tokens
from modularforge.info import describe
from modularforge.model.backbone import KeyValueCache
from modularforge.model.folder import load_model, read_tensors
from modularforge.model.hub_config import OWN_ROWS_NAME
from modularforge.model.moe import restrict_routing
from modularforge.pipeline import stage_settings
from modularforge.run import Run
from modularforge.stored_models import stored_model
from tests.conftest import tiny_config
from tests.pipeline.test_experts import beside

EMBEDDING = "model.embed_tokens.weight"
TOKENS_BT = torch.arange(2, 50).view(2, 24)
LORA = {"kind": "lora", "lora": {"rank": 3, "alpha": 6.0, "targets": "mlp"}}


def own_config(finished_run: Config, folder: Path, kind: dict[str, Any]) -> Config:
    experts = {"anchored": False, "unfreeze": ["embeddings", "head"], "unfreeze_rate": 1.0, **kind}
    return beside(finished_run, folder, experts=experts, assembly={"router": "evidence", "shared": "own"})


@pytest.fixture(scope="module", params=["ffn", "lora"])
def config(request: Any, finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An assembled model whose experts keep their rows; tests must not change it."""
    found = own_config(finished_run, tmp_path_factory.mktemp("own"), LORA if request.param == "lora" else {})
    run = Run(found)
    for index in range(3):
        run.make("expert", index)
    run.make("assemble")
    return found


def logits(model: Any, tokens_BT: Tensor = TOKENS_BT, **given: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tokens_BT, **given)
    return found


def test_the_file_has_each_experts_rows_and_the_weights_the_backbones(config: Config) -> None:
    run = Run(config)
    folder = run.require("assemble").local_folder()
    rows, backbone = load_file(folder / OWN_ROWS_NAME), run.backbone.tensors
    for index in range(3):
        expected = load_file(run.require("expert", index).local_file(SHARED_NAME))[EMBEDDING]
        assert torch.equal(rows[f"{index:05d}.{EMBEDDING}"], expected)
        assert not torch.equal(expected, backbone[EMBEDDING])
    assert len(rows) == 3, "the head is tied"
    width = backbone[EMBEDDING].shape[1]
    assert torch.equal(read_tensors(folder)[EMBEDDING][:, :width], backbone[EMBEDDING])
    assert "shared_means" not in run.require("assemble").manifest.facts


def test_tokens_that_visit_one_expert_see_its_rows_alone(config: Config) -> None:
    """With all slots but one closed the model is that expert alone, or the backbone."""
    run = Run(config)
    model = load_model(run.require("assemble").local_folder())
    restrict_routing(model, [2])  # slot 0 is the public expert
    assert torch.allclose(logits(model), logits(run.backbone.expert(run.require("expert", 1))), atol=2e-3)
    assert not torch.allclose(logits(model), logits(run.backbone.expert(run.require("expert", 0))), atol=2e-3)
    restrict_routing(model, [0])
    assert torch.allclose(logits(model), logits(run.backbone.model()), atol=2e-3)


def test_losses_are_those_of_its_logits_and_have_gradients(config: Config) -> None:
    model = load_model(Run(config).require("assemble").local_folder())
    targets_BT = TOKENS_BT.roll(-1, dims=1).clone()
    targets_BT[0, :3] = -100
    plain = torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), targets_BT.flatten(), reduction="none")
    each = logits(model, targets_BT=targets_BT, reduction="none")
    assert torch.allclose(each.flatten(), plain, atol=1e-5)
    mean = model(TOKENS_BT, targets_BT=targets_BT)
    assert torch.allclose(mean, plain.sum() / (targets_BT != -100).sum(), atol=1e-5)
    gain = model.blocks[0].input_layernorm.weight.requires_grad_(True)
    model(TOKENS_BT, targets_BT=targets_BT).backward()
    assert gain.grad is not None
    assert gain.grad.abs().sum() > 0


def test_reading_on_with_a_cache_is_reading_at_once(config: Config) -> None:
    model = load_model(Run(config).require("assemble").local_folder())
    cache = KeyValueCache()
    parts = [logits(model, TOKENS_BT[:, :10], cache=cache), logits(model, TOKENS_BT[:, 10:], cache=cache)]
    assert torch.allclose(torch.cat(parts, dim=1), logits(model), atol=1e-4)


def test_what_is_generated_follows_from_the_experts_own_heads(config: Config) -> None:
    model, greedy = load_model(Run(config).require("assemble").local_folder()), Sampling(temperature=0)
    prompts, said = [[5, 6, 7, 9], [11, 12], [40, 8, 30]], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        said.append(ids[len(prompt) :])
        cache = KeyValueCache()
        with torch.no_grad():
            found_V = model.next_logits(torch.tensor([prompt]), cache)[0]
        assert torch.allclose(found_V, logits(model, torch.tensor([prompt]))[0, -1], atol=1e-5)
        assert not torch.allclose(found_V, model.lm_head(model.hidden(torch.tensor([prompt])))[0, -1], atol=1e-5)
    assert [continue_tokens(model, prompt, 6, greedy, ()) for prompt in prompts] == said
    assert continue_batch(model, prompts, 6, greedy, ()) == said


def test_what_is_stored_is_what_is_loaded_and_counted(config: Config) -> None:
    artifact = Run(config).require("assemble")
    folder, stored = load_model(artifact.local_folder()), stored_model(artifact.url).load()
    assert torch.allclose(logits(folder), logits(stored), atol=1e-5)
    facts, found = artifact.manifest.facts, sizes_of(folder, config.model.context_length)
    assert facts["parameters"] == found["parameters"]
    assert facts["active_parameters"] == found["active_parameters"]
    rows = Run(config).backbone.tensors[EMBEDDING].numel()
    assert facts["own_rows"] == rows
    assert "has embeddings and a head of its own" in artifact.read_bytes("README.md").decode()
    said = next(line for line in describe(config).splitlines() if line.startswith("assembled"))
    assert "(embeddings, head) that each expert trains too and keeps for itself, in 1 round(s)" in describe(config)
    assert f"{facts['parameters']:,}" in said
    folder.own_rows = None
    plain = sizes_of(folder, config.model.context_length)
    assert found["parameters"] - plain["parameters"] == 3 * rows
    assert found["active_parameters"] - plain["active_parameters"] == rows, "two slots are visited"
    assert found["flops_per_token"] - plain["flops_per_token"] == 2 * rows


def test_an_expert_that_goes_takes_its_rows_along(config: Config, tmp_path: Path) -> None:
    edited = edit_experts.remove(Run(config).require("assemble").url, 1, str(tmp_path / "two"))
    rows = load_file(edited.local_file(OWN_ROWS_NAME))
    expected = load_file(Run(config).require("expert", 2).local_file(SHARED_NAME))[EMBEDDING]
    assert len(rows) == 2
    assert torch.equal(rows[f"{1:05d}.{EMBEDDING}"], expected)


def test_a_calibrated_model_keeps_them(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.output_dir, tmp_path / "run", symlinks=True)
    calibration = config.calibration.model_copy(update={"steps": 3, "peak_learning_rate": 1e-2})
    run = Run(config.model_copy(update={"calibration": calibration, "output_dir": str(tmp_path / "run")}))
    artifact: Artifact = run.make("calibrate")
    if artifact.manifest.facts["kept"]:
        assert load_model(artifact.local_folder()).own_rows is not None


def test_a_file_of_another_model_is_refused(config: Config, tmp_path: Path) -> None:
    shutil.copytree(Run(config).require("assemble").local_folder(), tmp_path / "model")
    path = tmp_path / "model" / OWN_ROWS_NAME
    rows = load_file(path)
    from safetensors.torch import save_file

    save_file({name: tensor for name, tensor in rows.items() if not name.startswith("00002")}, path)
    with pytest.raises(MismatchError, match=r"must have rows of 3 experts .* but is of another model"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "text_router.tables").unlink()
    with pytest.raises((MismatchError, Exception), match=r"text_router\.tables|how texts choose"):
        load_model(tmp_path / "model")


def test_the_joint_mixture_has_such_rows_too_and_trains_them(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.output_dir, tmp_path / "run", symlinks=True)
    run = Run(config.model_copy(update={"output_dir": str(tmp_path / "run")}))
    folder = run.make("joint_evidence").local_folder()
    rows, backbone = load_file(folder / OWN_ROWS_NAME), run.backbone.tensors[EMBEDDING]
    assert sorted(rows) == [f"{index:05d}.{EMBEDDING}" for index in range(3)]
    assert all(not torch.equal(found, backbone) for found in rows.values())
    assert not torch.equal(rows[f"{0:05d}.{EMBEDDING}"], rows[f"{1:05d}.{EMBEDDING}"])
    model = load_model(folder)
    with_rows = logits(model)
    assert model.own_rows is not None
    assert (
        sizes_of(model, config.model.context_length)["parameters"] == cost.sizes_of(config, "joint_evidence").parameters
    )
    model.own_rows = None
    assert not torch.allclose(logits(model), with_rows, atol=1e-2)


def test_the_joint_mixture_is_the_same_one_whatever_else_experts_share(tmp_path: Path) -> None:
    def settings(**given: Any) -> dict[str, Any]:
        shared = given.pop("shared", "equal")
        assembly = {"router": "evidence", "shared": shared}
        return stage_settings(
            tiny_config(tmp_path, experts={"anchored": False, **given}, assembly=assembly), "joint_evidence"
        )

    plain = settings()
    assert settings(unfreeze=["embeddings", "norms"], shared="counts") == plain
    own = settings(unfreeze=["head", "embeddings", "norms"], shared="own")
    assert own == {**plain, "assembly.shared": "own", "experts.unfreeze": ["embeddings", "head"]}
    assert settings(unfreeze=["embeddings", "head"], shared="own") == own


def test_embeddings_alone_leave_an_untied_head_to_the_backbone(finished_run: Config, tmp_path: Path) -> None:
    values = finished_run.model_dump(mode="json")
    model = values["model"] | {"tied_head": False}
    experts = {"anchored": False, "unfreeze": ["embeddings"], "unfreeze_rate": 1.0}
    assembly = {"router": "evidence", "shared": "own"}
    config = tiny_config(tmp_path, data_dir=finished_run.data_url, model=model, experts=experts, assembly=assembly)
    run = Run(config)
    for stage, index in (("backbone", None), ("expert", 0), ("expert", 1), ("expert", 2), ("assemble", None)):
        run.make(stage, index)
    artifact = run.require("assemble")
    found = load_model(artifact.local_folder())
    assert (
        artifact.manifest.facts["active_parameters"]
        == sizes_of(found, config.model.context_length)["active_parameters"]
    )
    restrict_routing(found, [2])
    alone = run.backbone.expert(run.require("expert", 1))
    assert torch.allclose(logits(found), logits(alone), atol=2e-3)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, r"experts\.unfreeze must have embeddings where assembly\.shared is own"),
    ({"unfreeze": ["embeddings"]}, {"router": "ridge"}, r"assembly\.shared must be own only where tokens choose"),
    ({"unfreeze": ["embeddings"]}, {"token_pairs": 0}, r"assembly\.shared must be own only where tokens choose"),
    ({"unfreeze": ["embeddings"], "rounds": 2}, {}, r"experts\.rounds must be 1 where assembly\.shared is own"),
]


@pytest.mark.parametrize(("experts", "assembly", "sentence"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_rows_that_nobody_could_visit_are_refused(
    experts: dict[str, Any], assembly: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    changes = {"router": "evidence", "shared": "own", **assembly}
    with pytest.raises(ConfigError, match=sentence):
        tiny_config(tmp_path, experts={"anchored": False, **experts}, assembly=changes)
