"""Pretrained encoders and language models: frozen, named by their bytes, and never in what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modularforge.config import Config
from modularforge.config_files import complete_config
from modularforge.errors import DataError, MismatchError
from modularforge.model.backbone import KeyValueCache
from modularforge.model.folder import load_pretrained, read_tensors, save_tensors
from modularforge.pretrained.fetch import fetch
from modularforge.pretrained.shape import read_pretrained_config
from modularforge.pretrained.sources import published_name
from modularforge.run import Run
from modularforge.speech.encoder_files import encoder_folder
from modularforge.speech.folder import load_speech, parts_of
from modularforge.speech.hub import load_published
from modularforge.speech.model import read
from tests.pretrained import gguf_files, models
from tests.pretrained.models import llama
from tests.speech.runs import run_all, speech_config


def save_whisper(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    sizes = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
    others = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 30}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(max_source_positions=60, **sizes, **others, **ids)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return {"features": "whisper"}


def save_conformer(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**sizes)).save_pretrained(folder)
    return {"features": "fbank", "normalise": "utterance"}


def config_of(folder: Path, data: dict[str, Any], decoder: str = "llama") -> Config:
    speech = {
        "data": {"split_field": "split", **data},
        "model": {"encoder": str(folder / "encoder"), "projector_width": 24, "pool_kernel": 3},
        "decoding": {"max_tokens": 4, "batch_size": 4},
    }
    config = speech_config(folder / "run", folder / "sounds", speech=speech, evaluation={"baselines": []})
    values = config.model_dump(mode="json") | {"model": {"pretrained": str(folder / decoder), "context_length": 64}}
    return complete_config(values, "settings")


@pytest.mark.parametrize("save", [save_whisper, save_conformer])
def test_a_run_on_pretrained_parts_saves_what_it_trained_and_names_the_rest(save: Any, tmp_path: Path) -> None:
    data = save(tmp_path / "encoder")
    llama(tmp_path / "llama")
    config = config_of(tmp_path, data)
    frozen = {name: read_tensors(tmp_path / name) for name in ("encoder", "llama")}
    results = run_all(config)
    assert list(results["models"]) == ["backbone", "expert-0", "expert-1", "oracle", "assembled"]
    run = Run(config)
    folder = run.require("assemble").local_folder()
    assert {name.split(".")[0] for name in read_tensors(folder)} == {"projector", "steering"}
    model = load_speech(folder)
    assert model.frozen.num_layers == 3
    assert model.steering is not None
    assert model.steering.shape.sites == 3
    for name, tensors in frozen.items():
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in read_tensors(tmp_path / name).items())
    theirs = {bare(name): tensor for name, tensor in frozen["encoder"].items()}
    own = {bare(name): tensor for name, tensor in model.encoder.state_dict().items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    shutil.rmtree(tmp_path / "encoder")
    save(tmp_path / "encoder")
    load_speech(folder)  # the same bytes elsewhere or again are the same encoder
    changed = {name: tensor + 1 for name, tensor in read_tensors(tmp_path / "encoder").items()}
    save_tensors(changed, tmp_path / "encoder/model.safetensors")
    with pytest.raises(MismatchError, match=r"the encoder at .* must be the one that was trained with"):
        load_speech(folder)


@pytest.mark.parametrize("save", [models.llama, models.qwen3, models.mistral])
def test_every_family_reads_embeddings_as_it_reads_ids(save: Any, tmp_path: Path) -> None:
    decoder, ids_BT = load_pretrained(save(tmp_path / "model")), torch.arange(40).view(2, 20) * 7 % models.VOCABULARY
    with torch.inference_mode():
        x_BSW, expected = decoder.model.embed_tokens(ids_BT), decoder(ids_BT)
        assert torch.equal(decoder.lm_head(read(decoder, x_BSW)), expected)
        cache = KeyValueCache()
        parts = [read(decoder, part_BSW, cache) for part_BSW in x_BSW.split([12, 1, 7], dim=1)]
        assert torch.allclose(decoder.lm_head(torch.cat(parts, dim=1)), expected, atol=1e-5)


def test_a_language_model_may_be_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are those that the file's blocks stand for; the run knows it by the file's bytes, wherever it lies."""
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))
    source = gguf_files.source(tmp_path / "llama")
    path = gguf_files.write(tmp_path / "small.gguf", source, gguf_files.MIXED)
    config = config_of(tmp_path, save_whisper(tmp_path / "encoder"), path.name)
    results = run_all(config)
    assert list(results["models"]) == ["backbone", "expert-0", "expert-1", "oracle", "assembled"]
    rows = results["models"]
    assert rows["assembled"]["mean_loss"] < rows["backbone"]["mean_loss"]
    folder = Run(config).require("assemble").local_folder()
    assert {name.split(".")[0] for name in read_tensors(folder)} == {"projector", "steering"}
    model = load_speech(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.allclose(model.decoder(ids), theirs.eval()(ids).logits, atol=1e-5)
    elsewhere = path.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(DataError, match=r"small.gguf must be a GGUF file, but there is none; fix the path"):
        load_speech(folder)
    again = load_published(str(folder), decoder=str(elsewhere))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    gguf_files.write(path, source)
    with pytest.raises(MismatchError, match=r"the language model at .*small.gguf must be the one that was trained"):
        load_speech(folder)


def bare(name: str) -> str:
    return name.removeprefix("model.").removeprefix("encoder.")


def test_another_encoder_makes_another_backbone(tmp_path: Path) -> None:
    data = save_whisper(tmp_path / "encoder")
    llama(tmp_path / "llama")
    config = config_of(tmp_path, data)
    for stage in ("prepare-data", "partition"):
        Run(config).make(stage)
    before = Run(config).plan("backbone").fingerprint
    assert Run(config).plan("backbone").inputs.keys() == {"corpus", "pretrained", "encoder"}
    values = (tmp_path / "encoder/config.json").read_text()
    (tmp_path / "encoder/config.json").write_text(values + "\n")
    assert Run(config).plan("backbone").fingerprint != before


@pytest.mark.parametrize(
    ("save", "changes", "message"),
    [
        (save_whisper, {"bins": 64}, "must be whisper and speech.data.bins 80 .* but they are whisper and 64"),
        (save_whisper, {"features": "fbank"}, "must be whisper and speech.data.bins 80 .* but they are fbank and 80"),
        (save_conformer, {"features": "whisper"}, "must be fbank and speech.data.bins 80 .* but they are whisper"),
    ],
)
def test_features_that_the_encoder_does_not_read_are_refused_before_they_are_computed(
    save: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, save(tmp_path / "encoder"), str(llama(tmp_path / "llama")))
    data = config.speech.data.model_copy(update=changes)
    config = config.model_copy(update={"speech": config.speech.model_copy(update={"data": data})})
    with pytest.raises(DataError, match=message):
        Run(config).make("prepare-data")
    with pytest.raises(DataError, match=message):
        parts_of(config, 30)


def test_a_folder_without_an_encoder_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(DataError):
        encoder_folder(str(tmp_path / "empty"))


def test_the_models_of_the_quickstart_are_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="run `make quickstart-speech`"):
        read_pretrained_config("models/smollm2")
    with pytest.raises(DataError, match="run `make quickstart-speech`"):
        fetch("models/smollm2")
    with pytest.raises(DataError, match="run `make quickstart-speech`"):
        encoder_folder("models/whisper-tiny-en")
    assert published_name("models/smollm2") is None
