"""config.json and generation_config.json in the spelling of transformers 4 and 5 at once; needs no torch.

What is written can be read by both generations, and what is read may come from either, or from other people's models as
long as our decoder computes the same as theirs (supported.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoints.parsing import parse_object
from modularforge.config import ModelConfig, RopeScalingConfig
from modularforge.errors import DataError, one_line
from modularforge.model.names import family_of
from modularforge.model.supported import DENSE_TYPES, MOE_TYPES, check_supported

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
TABLES_NAME = "text_router.tables"
"""What ModularForge routes by: safetensors by another name, since servers take every `.safetensors` for weights."""
TABLES_FORMAT = 1
OWN_ROWS_NAME = "expert_rows.tables"
"""Embeddings and heads that experts have for themselves: safetensors by another name, for the same reason."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""A tokenizer as Hugging Face stores it; all but the first may be missing."""
TOKENIZER_NAME = TOKENIZER_FILES[0]

FRESH: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "dtype": "float32"}
"""What a model that was not pretrained says of its special tokens and weights."""


def backbone_config(model: ModelConfig, vocab_size: int, carried: Mapping[str, Any] = FRESH) -> dict[str, Any]:
    """config.json of a backbone: LlamaForCausalLM or Qwen3ForCausalLM.

    `carried` is the config.json that special tokens and type of the weights are taken over from.
    """
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model.family]
    kind: dict[str, Any] = {"architectures": [architecture], "model_type": model.family, "attention_bias": False}
    kind |= {"mlp_bias": False} if model.family == "llama" else _no_sliding_window()
    return {**kind, **_common_config(model, vocab_size, carried)}


def moe_config(
    model: ModelConfig, vocab_size: int, experts: int, experts_per_token: int, carried: Mapping[str, Any] = FRESH
) -> dict[str, Any]:
    """config.json of an assembled model: MixtralForCausalLM, or Qwen3MoeForCausalLM on a Qwen3 backbone.

    `carried` is the backbone's config.json, whose special tokens and type of the weights stay.
    """
    values: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        **_common_config(model, vocab_size, carried),
    }
    if model.family == "qwen3":
        del values["router_jitter_noise"]
        values |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "moe_intermediate_size": model.ffn_width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            **_no_sliding_window(),
        }
    return values


def _no_sliding_window() -> dict[str, Any]:
    return {"use_sliding_window": False, "sliding_window": None}


def _common_config(model: ModelConfig, vocab_size: int, carried: Mapping[str, Any]) -> dict[str, Any]:
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else None
    dtype = carried.get("dtype") or carried.get("torch_dtype") or "float32"
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_per_head,
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.tied_head,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **{name: carried.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def generation_config(values: Mapping[str, Any] = FRESH) -> dict[str, Any]:
    """generation_config.json: the special tokens that start and end a text, from a config.json."""
    return {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def end_tokens(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, from a config.json or generation_config.json: one, several or none."""
    found = values.get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def special_ids(values: Mapping[str, Any], tokenizer: bytes) -> tuple[int, ...]:
    """Ids of the tokens that are no text, from the contents of config.json and tokenizer.json; raises DataError.

    They are those that the tokenizer calls special, and those that settings name.
    """
    named = [values.get(name) for name in ("bos_token_id", "pad_token_id")]
    found = {*end_tokens(values), *(token for token in named if isinstance(token, int))}
    try:
        added = parse_object(tokenizer).get("added_tokens", [])
        found |= {int(token["id"]) for token in added if token.get("special")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"tokenizer.json must list its added tokens with ids, but does not ({error}); make its artifact again"
        ) from error
    # Old settings say -1 for none, and a tokenizer may know tokens that the model has not.
    return tuple(sorted(token for token in found if 0 <= token < int(values["vocab_size"])))


def model_config_of(values: Mapping[str, Any]) -> ModelConfig:
    """Our settings from the config.json of a Llama, Mistral, Qwen3, Mixtral or Qwen3-MoE model."""
    theta, scaling = _rotary_settings(values)
    return ModelConfig(
        family=family_of(values["model_type"]),
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        ffn_width=values["moe_intermediate_size" if values["model_type"] == "qwen3_moe" else "intermediate_size"],
        head_width=values.get("head_dim"),
        context_length=values["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=values.get("rms_norm_eps", 1e-6),
        tied_head=values.get("tie_word_embeddings", False),
    )


def _rotary_settings(values: Mapping[str, Any]) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of the rotary positions, which transformers 5 keeps in `rope_parameters`."""
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    newer = values.get("rope_parameters") or {}
    theta = found.get("rope_theta") or newer.get("rope_theta") or values.get("rope_theta") or 10_000.0
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    known = {name: found[name] for name in RopeScalingConfig.model_fields if name in found}
    return theta, RopeScalingConfig(**{**known, "rope_type": kind})


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; raises DataError when it is none, or of a model we cannot compute."""
    return parse_config(_config_bytes(folder), str(folder / CONFIG_NAME))


def read_values(folder: Path) -> dict[str, Any]:
    """config.json of a folder, of whatever model it is; raises DataError when there is none."""
    return _parse_values(_config_bytes(folder), str(folder / CONFIG_NAME))


def _config_bytes(folder: Path) -> bytes:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise DataError(f"{folder} must be a model folder, but has no {CONFIG_NAME}; name the folder that holds it")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} must be readable, but {one_line(error)}; fix its permissions") from error


def parse_config(content: bytes, origin: str) -> dict[str, Any]:
    """The same from the bytes of a config.json; `origin` names them in errors."""
    values = _parse_values(content, origin)
    check_supported(values, origin)
    try:
        model_config_of(values)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"])
        raise DataError(
            f"{origin} must describe a model, but its {name} is {found['input']!r:.60} ({found['msg']}); fix it, or "
            "choose another model"
        ) from error
    return values


def _parse_values(content: bytes, origin: str) -> dict[str, Any]:
    try:
        return parse_object(content)
    except ValueError as error:
        raise DataError(
            f"{origin} must be a JSON object, but is not ({one_line(error)}); make the model again"
        ) from error


def experts_of(values: Mapping[str, Any]) -> int:
    """Experts per layer of an assembled model, whichever name transformers gave them."""
    return int(values.get("num_local_experts") or values["num_experts"])


def is_moe(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an assembled model."""
    return values["model_type"] in MOE_TYPES


def is_dense(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that can be a backbone."""
    return values["model_type"] in DENSE_TYPES


def write_json(path: Path, values: Any) -> None:
    """Write one JSON file of a model folder."""
    path.write_text(json_text(values))


def json_text(values: Any) -> str:
    """The content of a JSON file of a model folder."""
    return json.dumps(values, indent=2) + "\n"
