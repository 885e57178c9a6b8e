"""What may be named as a pretrained model, what is said of other weights, and what `--verify` says it verified."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest

from checkpoints import StoreError
from modularforge.errors import ConfigError, DataError
from modularforge.pretrained.fetch import fetch, local_model, model_identity
from modularforge.pretrained.shape import read_pretrained_config
from modularforge.pretrained.sources import check_weights, model_files
from modularforge.stored_models import stored_model
from tests.pretrained import models

OTHER_FILES = [
    ("model.ggml", "is a GGUF file .*; name the file itself as model.pretrained, or make a folder of it"),
    ("pytorch_model.bin", "is a pickle of PyTorch, which can run code .*save_pretrained"),
    ("last.ckpt", "is a pickle of PyTorch"),
    ("weights.pt", "is a pickle of PyTorch"),
    ("model.onnx", "is weights of another framework"),
    ("model.safetensors", r"is a file; name the folder that holds it and config\.json"),
]


@pytest.mark.parametrize(("name", "message"), OTHER_FILES)
def test_a_file_in_place_of_a_model_folder_is_told_what_it_is(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0")
    monkeypatch.chdir(tmp_path)  # a bare name could be one of the Hub
    for model in (str(tmp_path / name), name):
        for use in (fetch, local_model, read_pretrained_config, stored_model):
            with pytest.raises(DataError, match=f"must be a model folder with safetensors weights, but .*{message}"):
                use(model)


@pytest.mark.parametrize(("name", "message"), OTHER_FILES[:-1])
def test_a_folder_of_other_weights_is_told_what_it_holds(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    for use in (local_model, read_pretrained_config, fetch):
        with pytest.raises(DataError, match=f"must hold its weights as safetensors .*but has {name}: "):
            use(str(tmp_path))


def test_a_folder_of_nothing_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_pretrained_config(str(tmp_path))


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00b"])
def test_a_name_that_no_file_can_have_is_told(name: str) -> None:
    for use in (fetch, local_model, read_pretrained_config):
        with pytest.raises(DataError, match="must be a model folder, a URL or a name on the Hub") as told:
            use(f"models/{name}/x")
        assert len(str(told.value)) < 500


@pytest.mark.timeout(20)
def test_a_pipe_for_an_index_is_not_opened(tmp_path: Path) -> None:
    models.llama(tmp_path / "model", shard_size="60KB")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    os.mkfifo(tmp_path / "model" / "model.safetensors.index.json")
    for use in (local_model, fetch):
        with pytest.raises(StoreError, match="is a named pipe"):
            use(str(tmp_path / "model"))


@pytest.fixture
def odd_shards(tmp_path: Path) -> Path:
    """A model whose shards are not numbered by five digits."""
    folder = models.llama(tmp_path / "model", shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shards = sorted(set(values["weight_map"].values()))
    new = {name: f"weights.part{place}.safetensors" for place, name in enumerate(shards, start=1)}
    for old, name in new.items():
        (folder / old).rename(folder / name)
    values["weight_map"] = {tensor: new[name] for tensor, name in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    return folder


def test_shards_are_those_of_the_index_whatever_their_names(odd_shards: Path, tmp_path: Path) -> None:
    before = model_identity(str(odd_shards))
    copy = fetch(str(odd_shards), str(tmp_path / "copy"), verify=True)
    shards = {path.name for path in odd_shards.glob("weights.*")}
    assert len(shards) > 1
    assert shards < set(copy.manifest.files)
    assert check_weights(tmp_path / "copy")
    victim = odd_shards / "weights.part1.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert model_identity(str(odd_shards)) != before  # they are part of what the model is
    victim.unlink()
    with pytest.raises(DataError, match=r"the \d weight files that .*index.json names, but lacks weights.part1.safet"):
        local_model(str(odd_shards))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a\n/../b", 5, None, ""])
def test_an_index_names_no_file_elsewhere(odd_shards: Path, name: object) -> None:
    index = odd_shards / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(DataError, match="must be an index of weight files, but is not"):
        local_model(str(odd_shards))


def test_without_its_bytes_an_index_stands_for_the_usual_names() -> None:
    names = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    assert model_files(names, "m") == names


def test_a_password_in_a_models_url_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, store = models.llama(tmp_path / "source"), fsspec.filesystem("memory")
    for path in source.iterdir():
        store.pipe_file(f"/me:hunter22@host/llama/{path.name}", path.read_bytes())
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))
    url = "memory://me:hunter22@host/llama"
    for _ in range(2):
        copy = fetch(url)
    assert "hunter22" not in copy.url
    assert all(b"hunter22" not in path.read_bytes() for path in (tmp_path / "cache").rglob("*.json"))
    store.rm_file("/me:hunter22@host/llama/tokenizer.json")
    with pytest.raises(DataError, match=r"memory://\*\*\*@host/llama must hold tokenizer\.json"):
        fetch(url, str(tmp_path / "other"))


def test_verify_says_what_it_compared_and_what_nobody_can_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = models.llama(tmp_path / "source")
    for _ in range(2):  # when it is copied, and when it is there
        caplog.clear()
        with caplog.at_level("INFO", logger="modularforge"):
            artifact = fetch(str(source), str(tmp_path / "copy"), verify=True)
        size = sum(entry.size for entry in artifact.manifest.files.values())
        assert f"verified {len(artifact.manifest.files)} files, {size} bytes: every byte has the hash" in caplog.text
        assert "tensors that config.json asks for" in caplog.text
        assert f"copied from {source}; whether that was what its maker published cannot be verified" in caplog.text
    caplog.clear()
    fetch(str(source), str(tmp_path / "copy"))
    assert "verified" not in caplog.text
