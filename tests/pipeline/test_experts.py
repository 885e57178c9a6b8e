"""Experts are independent of order and company, and refuse what would spoil them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import StoreError, find_artifact, paths
from checkpoints.training import Checkpoint, list_checkpoints, save_checkpoint
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError, TrainingError
from modularforge.experts.ffn.training import expert_model
from modularforge.pipeline import checkpoint_url, stage_url
from modularforge.run import Run
from modularforge.stage_outputs import Backbone
from modularforge.stages import assemble, expert
from tests.conftest import tiny_config


def beside(finished_run: Config, folder: Path, **changes: object) -> Config:
    """A new run that shares the data and the backbone of the finished one."""
    config = tiny_config(folder / "run", data_dir=finished_run.data_url, **changes)
    target = paths.local_path(stage_url(config, "backbone"))
    target.parent.mkdir(parents=True)
    target.symlink_to(paths.local_path(stage_url(finished_run, "backbone")))
    return config


@pytest.mark.parametrize("order", [(2, 0), (1,)])
def test_an_experts_bytes_do_not_depend_on_order_or_company(
    order: tuple[int, ...], finished_run: Config, tmp_path: Path
) -> None:
    config = beside(finished_run, tmp_path)
    torch.manual_seed(12345)
    for index in order:
        expert.run(Run(config), index)
    for index in order:
        theirs, ours = Run(finished_run).require("expert", index), Run(config).require("expert", index)
        assert theirs.manifest.files == ours.manifest.files


@pytest.mark.parametrize("anchored", [True, False])
def test_only_the_new_ffn_and_its_rows_learn(anchored: bool, finished_run: Config, tmp_path: Path) -> None:
    config = beside(finished_run, tmp_path, experts={"anchored": anchored}, assembly={"router": "ridge"})
    expert.run(Run(config), 0)
    backbone = Backbone(Run(config).require("backbone"))
    own = backbone.expert(Run(config).require("expert", 0)).state_dict()
    for name, tensor in backbone.tensors.items():
        if ".mlp." not in name:
            assert torch.equal(own[name], tensor), name
    weights = load_file(Run(config).require("expert", 0).local_file("expert.safetensors"))
    assert len(weights) == 3 * config.model.layers
    assert all(f".experts.{int(anchored)}." in name for name in weights)
    assert ("router.safetensors" in Run(config).require("expert", 0).manifest.files) == anchored


def test_a_fresh_expert_starts_from_other_weights_than_the_backbone(finished_run: Config) -> None:
    backbone = Backbone(Run(finished_run).require("backbone"))
    settings = finished_run.experts.model_copy(update={"init": "fresh", "anchored": False})
    torch.manual_seed(0)
    model = expert_model(backbone.tensors, backbone.values, settings, None).whole()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(model.state_dict()[name], backbone.tensors[name])


def test_a_plain_run_assembles_without_the_public_expert(finished_run: Config, tmp_path: Path) -> None:
    config = beside(finished_run, tmp_path, experts={"anchored": False}, assembly={"router": "ridge"})
    for index in range(3):
        expert.run(Run(config), index)
    assemble.run(Run(config))
    assert Run(config).require("assemble").manifest.facts["experts"] == 3


def test_a_partition_smaller_than_one_batch_is_refused_and_nothing_is_saved(
    finished_run: Config, tmp_path: Path
) -> None:
    config = beside(finished_run, tmp_path, experts={"batch_size": 100_000})
    with pytest.raises(TrainingError, match=r"partition 0 must fill one batch"):
        expert.run(Run(config), 0)
    assert find_artifact(stage_url(config, "expert", 0)) is None


def test_a_loss_that_is_not_finite_stops_and_nothing_is_saved(finished_run: Config, tmp_path: Path) -> None:
    config = beside(finished_run, tmp_path, experts={"peak_learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"must have finite losses"):
        expert.run(Run(config), 0)
    assert find_artifact(stage_url(config, "expert", 0)) is None


def test_an_expert_of_other_settings_is_refused_with_the_difference(finished_run: Config, tmp_path: Path) -> None:
    config = beside(finished_run, tmp_path)
    expert.run(Run(config), 0)
    changed = config.model_copy(update={"experts": config.experts.model_copy(update={"steps": 11})})
    with pytest.raises(MismatchError, match=r"experts\.steps is 11 here and 10 there"):
        expert.run(Run(changed), 0)


def test_a_checkpoint_of_another_config_is_refused_and_kept(finished_run: Config, tmp_path: Path) -> None:
    config = beside(finished_run, tmp_path)
    url = checkpoint_url(config, "expert-0")
    save_checkpoint(url, Checkpoint(5, {"weights.x": torch.ones(1)}, {"position": 20}), "of other settings", 2)
    with pytest.raises(StoreError, match="must be a checkpoint of this config"):
        expert.run(Run(config), 0)
    assert find_artifact(stage_url(config, "expert", 0)) is None
    assert list_checkpoints(url) == ["step-00000005"]


def test_an_expert_of_another_backbone_is_refused_by_the_assembler(finished_run: Config, tmp_path: Path) -> None:
    from dataclasses import replace

    from modularforge.assembly.assemble import check_same_backbone
    from modularforge.experts.ffn import FFN

    artifact = Run(finished_run).require("expert", 0)
    shared = dict(artifact.manifest.facts["shared_tensors"])
    shared["model.norm.weight"] = "0" * 64
    foreign = replace(
        artifact,
        manifest=replace(artifact.manifest, facts={**artifact.manifest.facts, "shared_tensors": shared}),
    )
    with pytest.raises(MismatchError, match=r"1 shared tensors differ \(first model\.norm\.weight\)"):
        check_same_backbone(FFN, Run(finished_run).require("backbone"), [foreign])


def test_an_index_out_of_range_is_refused(finished_run: Config) -> None:
    run = Run(finished_run)
    for ask in (partial(expert.run, run), partial(run.make, "branch"), partial(run.require, "expert")):
        for index in (3, -1):
            with pytest.raises(ConfigError, match="between 0 and 2"):
                ask(index)
