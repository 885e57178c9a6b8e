"""Our decoder against transformers on pretrained models: positions, heads, norms, types; and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints.safetensors import read_spans
from modularforge.errors import DataError
from modularforge.model.folder import load_model, load_pretrained, save_tensors
from modularforge.model.hub_config import backbone_config, end_tokens, model_config_of, moe_config, read_config
from modularforge.model.moe import build_moe
from modularforge.model.sizes import dense_shapes
from modularforge.pretrained.sources import check_weights, hub_name, model_files
from tests.pretrained import models

TOLERANCE = 1e-5
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (models.llama, {}),
    (models.llama, {"rope_parameters": models.LINEAR, "head_dim": 12}),
    (models.llama, {"rope_parameters": models.YARN, "tie_word_embeddings": True}),
    (models.llama, {"rope_parameters": {**models.YARN, "truncate": False}}),
    (models.llama, {"rope_parameters": {**models.YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}}),
    (models.mistral, {}),
    (models.qwen3, {}),
    (models.qwen3, {"rope_parameters": models.YARN, "tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
]


def ids(vocabulary: int = models.VOCABULARY) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, models.POSITIONS), generator=torch.Generator().manual_seed(3))


def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    assert logits.std() > 0.1  # equal to something, not to nothing
    return logits


@pytest.mark.parametrize(("make", "changes"), KINDS)
def test_a_pretrained_model_gives_transformers_logits(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "model", **changes)
    expected = logits_of_transformers(folder, ids())
    for model in (load_model(folder), load_pretrained(folder)):
        with torch.no_grad():
            assert (model(ids()) - expected).abs().max() < TOLERANCE
    values = read_config(folder)
    found = {name: span.shape for name, span in check_weights(folder).items()}
    assert found == dense_shapes(model_config_of(values), values["vocab_size"])


@pytest.mark.parametrize(("make", "changes"), KINDS)
def test_a_mixture_on_it_gives_transformers_logits(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    values = read_config(make(tmp_path / "model", **changes))
    config = model_config_of(values)
    torch.manual_seed(4)
    mixture = build_moe(config, values["vocab_size"], 3, 2).eval()
    for weight in mixture.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.2)  # attention and routing that differ
    weights = mixture.state_dict()
    if config.tied_head:
        del weights["lm_head.weight"]
    save_tensors(weights, tmp_path / "mixture" / "model.safetensors")
    written = moe_config(config, values["vocab_size"], 3, 2, values)
    (tmp_path / "mixture" / "config.json").write_text(json.dumps(written))
    expected = logits_of_transformers(tmp_path / "mixture", ids())
    with torch.no_grad():
        assert (mixture(ids()) - expected).abs().max() < TOLERANCE
        assert torch.equal(load_model(tmp_path / "mixture")(ids()), mixture(ids()))


@pytest.mark.parametrize("make", [models.llama, models.qwen3])
def test_the_older_spelling_of_positions_is_read_the_same(make: Any, tmp_path: Path) -> None:
    """transformers 4 writes rope_theta and rope_scaling, where 5 writes rope_parameters."""
    folder = make(tmp_path / "model", rope_parameters=models.YARN)
    newer = read_config(folder)
    older = {name: value for name, value in newer.items() if name not in ("rope_parameters", "dtype")}
    scaling = {name: value for name, value in models.YARN.items() if name not in ("rope_theta", "rope_type")}
    older |= {"rope_theta": models.YARN["rope_theta"], "rope_scaling": {**scaling, "type": "yarn"}}
    assert model_config_of(older) == model_config_of(newer)


def test_our_own_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    for make, changes in KINDS:
        config = model_config_of(read_config(make(tmp_path / f"{make.__name__}{len(changes)}", **changes)))
        assert model_config_of(backbone_config(config, 400)) == config
        assert model_config_of(moe_config(config, 400, 3, 2)) == config


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"attention_bias": True},
            "must have attention and feed-forward blocks without biases.* has attention_bias true",
        ),
        ({"model_type": "qwen2"}, "must have model_type llama, mistral, qwen3.*has 'qwen2'"),
        ({"hidden_act": "gelu"}, "must have hidden_act silu, but has 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "do not depend on the text's length, but has 'dynamic'",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "but has 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "a number factor for its rope_type linear, but has None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "twist": 1}}, "rope settings that are known .* has twist"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
            "rope settings that are known .* has mscale",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full attention in every layer"),
        ({"model_type": "mistral"}, "full attention in every layer, but has a sliding window"),
        ({"quantization_config": {"bits": 4}}, "plain weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 1"),
        ({"hidden_size": "wide"}, "a positive number hidden_size, but has 'wide'"),
        ({"hidden_size": 10**30}, "a positive number hidden_size, but has 1000000"),
        ({"vocab_size": True}, "a positive number vocab_size, but has True"),
        ({"num_hidden_layers": 10**9}, "a positive number num_hidden_layers"),
        ({"head_dim": 7}, "an even positive number as head_dim, but has 7"),
        ({"num_key_value_heads": 3}, "query heads that are a multiple of its num_key_value_heads, but has 4 and 3"),
        ({"rms_norm_eps": "small"}, "a positive number as rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "true or false as tie_word_embeddings, but has 'no'"),
        ({"eos_token_id": [1, "x"]}, "a token id or a list of them as eos_token_id"),
        ({"rope_parameters": [1]}, "an object as rope_parameters, but has"),
        ({"model_type": ["llama"]}, "must have model_type llama, .* but has"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "its beta_fast is 'x'"),
    ],
)
def test_what_we_would_compute_differently_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "model")
    if "rope_scaling" in values:
        values = {**values, "rope_parameters": None}
    with pytest.raises(DataError, match=message) as caught:
        read_config(changed(folder, **values))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_that_do_not_fit_their_config_are_refused_by_name(tmp_path: Path) -> None:
    folder = changed(models.qwen3(tmp_path / "model"), head_dim=8)
    with pytest.raises(DataError, match=r"k_norm\.weight in .* must have shape \(8,\), but has \(16,\)"):
        check_weights(folder)
    with pytest.raises(DataError, match=r"lm_head\.weight in .* none, as it is missing"):
        check_weights(changed(folder, head_dim=16, tie_word_embeddings=False))


def write_header(folder: Path, entry: dict[str, Any], length: int) -> Path:
    header = json.dumps({"model.norm.weight": entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(length))
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtypo": "F32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        ["F32", [2], [0, 8]],
    ],
)
def test_a_damaged_header_is_told_with_its_file(entry: Any, tmp_path: Path) -> None:
    path = write_header(tmp_path, entry, 8)
    with pytest.raises(DataError, match=r"model\.safetensors must be .*make it again"):
        read_spans(str(path))


def test_quantised_weights_are_refused_by_their_type(tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="but has F8_E4M3; choose a version that is not quantised"):
        check_weights(folder)


def test_a_mixture_is_no_backbone(tmp_path: Path) -> None:
    values = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(DataError, match="must hold a dense model to be a backbone"):
        check_weights(changed(models.llama(tmp_path / "model"), **values))


def test_files_of_a_model_are_chosen_and_missing_ones_named() -> None:
    names = ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "README.md", "vocab.json"]
    assert model_files(names, "m") == ["config.json", "tokenizer.json", "model.safetensors"]
    with pytest.raises(DataError, match="m must hold its weights as safetensors"):
        model_files(["config.json", "tokenizer.json", "pytorch_model.bin"], "m")
    with pytest.raises(DataError, match=r"m must hold tokenizer\.json"):
        model_files(["config.json", "model.safetensors"], "m")


def test_names_on_the_hub() -> None:
    assert hub_name("Qwen/Qwen3-0.6B").revision == "main"
    assert hub_name("Qwen/Qwen3-0.6B@v1").revision == "v1"
    for wrong in ("/models/qwen", "./qwen", "a/b/c", ""):
        with pytest.raises(DataError, match="there is no such folder"):
            hub_name(wrong)


def test_one_several_or_no_tokens_end_a_text() -> None:
    assert end_tokens({"eos_token_id": 3}) == (3,)
    assert end_tokens({"eos_token_id": [3, 5]}) == (3, 5)
    assert end_tokens({}) == ()
