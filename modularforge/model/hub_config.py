"""config.json and generation_config.json in the spelling of transformers 4 and 5 at once; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from modularforge.config import ModelConfig
from modularforge.errors import DataError

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def backbone_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """config.json of a backbone: LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        **_common_config(model, vocab_size),
    }


def moe_config(model: ModelConfig, vocab_size: int, experts: int, experts_per_token: int) -> dict[str, Any]:
    """config.json of an assembled model: MixtralForCausalLM."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        **_common_config(model, vocab_size),
    }


def _common_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width // model.heads,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_head,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "torch_dtype": "float32",
        "dtype": "float32",
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: the special tokens that start and end a text."""
    return {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def model_config_of(values: dict[str, Any]) -> ModelConfig:
    """Our settings from a config.json of a Llama or Mixtral model."""
    rope = values.get("rope_parameters") or {}
    return ModelConfig(
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        ffn_width=values["intermediate_size"],
        context_length=values["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        norm_epsilon=values["rms_norm_eps"],
        tied_head=values.get("tie_word_embeddings", False),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; raises DataError when it is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise DataError(f"{folder} must be a model folder, but has no {CONFIG_NAME}; name the folder that holds it")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} must be JSON, but is not ({error}); make the model again") from error
    if values.get("model_type") not in ("llama", "mixtral"):
        raise DataError(
            f"{path} must have model_type llama or mixtral, but has {values.get('model_type')!r}; "
            "only models that modularforge writes can be read"
        )
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise DataError(f"{path} must have a positive number {name}, but has {values.get(name)!r}; mend it")
    for name in ("num_local_experts", "num_experts_per_tok") if values["model_type"] == "mixtral" else ():
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise DataError(f"{path} must have a positive number {name}, but has {values.get(name)!r}; mend it")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write one JSON file of a model folder."""
    path.write_text(json.dumps(values, indent=2) + "\n")
