"""Models of other people on object stores as backbones, and assembled ones of which only some files are fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import open_artifact, paths, write_artifact
from checkpoints.options import cache_folder
from modularforge.config import ModelConfig
from modularforge.config_files import complete_config
from modularforge.model import names
from modularforge.model.folder import backbone_tensors, save_tensors
from modularforge.model.hub_config import moe_config, write_json
from modularforge.model.moe import build_moe, moe_layers
from modularforge.pretrained.fetch import fetch
from modularforge.run import Run
from modularforge.stages import backbone
from modularforge.stored_models import stored_model
from tests.conftest import prepare_data, run_command
from tests.pretrained import models
from tests.pretrained.test_pipeline import values_on


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("model") / "llama", torch.bfloat16, shard_size="40KB")


def upload(source: Path, url: str) -> str:
    """The files of a model as some other tool puts them there, without a manifest."""
    for path in source.iterdir():
        paths.replace_bytes(paths.join(url, path.name), path.read_bytes())
    return url


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_model_on_an_object_store_is_a_backbone(with_manifest: bool, s3: str, source: Path, tmp_path: Path) -> None:
    url = fetch(str(source), f"{s3}/model", verify=True).url if with_manifest else upload(source, f"{s3}/model")
    config, local = (complete_config(values_on(place, tmp_path / "run"), "tests") for place in (url, source))
    prepare_data(config)
    backbone.run(Run(config))
    assert Run(local).require("backbone").manifest.files.keys() == Run(config).require("backbone").manifest.files.keys()
    assert config.model.model_copy(update={"pretrained": None}) == local.model.model_copy(update={"pretrained": None})


def test_the_command_fetches_from_and_to_an_object_store(s3: str, source: Path, tmp_path: Path) -> None:
    upload(source, f"{s3}/plain")
    run_command("modularforge", "fetch", f"{s3}/plain", "--output", f"{s3}/whole", "--verify")
    run_command("modularforge", "fetch", f"{s3}/whole", "--output", str(tmp_path / "here"), "--verify")
    for path in source.iterdir():
        assert (tmp_path / "here" / path.name).read_bytes() == path.read_bytes()


def test_a_truncated_model_on_an_object_store_is_refused_and_leaves_nothing(
    s3: str, source: Path, tmp_path: Path
) -> None:
    upload(source, f"{s3}/plain")
    shard = next(iter(sorted(source.glob("model-*.safetensors"))))
    paths.replace_bytes(f"{s3}/plain/{shard.name}", shard.read_bytes()[:-9])
    done = run_command("modularforge", "fetch", f"{s3}/plain", "--output", str(tmp_path / "here"), check=False)
    assert done.returncode == 2
    assert "must be a whole weight file" in done.stderr
    assert not (tmp_path / "here").exists()


def test_of_experts_with_files_of_their_own_only_visited_ones_are_fetched(s3: str, tmp_path: Path) -> None:
    config = ModelConfig(width=24, layers=2, heads=4, kv_heads=2, ffn_width=40, context_length=32)
    torch.manual_seed(0)
    model = build_moe(config, 61, 6, 2).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.abs_()
        for layer in moe_layers(model):
            rows_ED = layer.gate.get_parameter("weight")
            rows_ED[1], rows_ED[4] = 1.0, 0.9
    tensors = backbone_tensors(model)
    with write_artifact(f"{s3}/assembled", "assembled", "test") as writer:
        for slot in range(6):
            own = {n: t for n, t in tensors.items() if (place := names.expert_position(n)) and place[1] == slot}
            save_tensors(own, writer.folder / f"expert-{slot}.safetensors")
        shared = {name: tensor for name, tensor in tensors.items() if names.expert_position(name) is None}
        save_tensors(shared, writer.folder / "shared.safetensors")
        write_json(writer.folder / "config.json", moe_config(config, 61, 6, 2))
        writer.commit()
    shutil.rmtree(cache_folder(), ignore_errors=True)
    loaded, ids = stored_model(f"{s3}/assembled").load(), torch.arange(32)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids), model(ids))
    fetched = {path.name for path in cache_folder().rglob("*.safetensors")}
    assert fetched == {"shared.safetensors", "expert-1.safetensors", "expert-4.safetensors"}
    assert len(open_artifact(f"{s3}/assembled").manifest.files) == 8
