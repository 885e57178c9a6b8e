"""What our decoder can compute of other people's models, judged by their config.json; needs no torch.

A model that would silently compute something else is refused in one sentence that names the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modularforge.config import RopeScalingConfig
from modularforge.errors import DataError

DENSE_TYPES = ("llama", "mistral", "qwen3")
MOE_TYPES = ("mixtral", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {*RopeScalingConfig.model_fields, "type", "rope_theta", "partial_rotary_factor"}

WHY_NO_BIAS = "attention and feed-forward blocks without biases, since the assembled model has no place for them"


def check_supported(values: Mapping[str, Any], origin: str) -> None:
    """Raise DataError unless these values of a config.json describe a model that we compute as transformers does."""
    if values.get("model_type") not in (*DENSE_TYPES, *MOE_TYPES):
        raise DataError(
            f"{origin} must have model_type {', '.join(DENSE_TYPES)}, {' or '.join(MOE_TYPES)}, but has "
            f"{values.get('model_type')!r}; choose a model of the Llama family or Qwen3"
        )
    for name in _needed_numbers(values):
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise DataError(f"{origin} must have a positive number {name}, but has {values.get(name)!r}; mend it")
    for wish, found in _obstacles(values):
        raise DataError(f"{origin} must have {wish}, but has {found}; choose another model")


def _needed_numbers(values: Mapping[str, Any]) -> Iterator[str]:
    yield from ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    yield "max_position_embeddings"
    if values["model_type"] in MOE_TYPES:
        yield from ("num_local_experts" if "num_local_experts" in values else "num_experts", "num_experts_per_tok")


def _obstacles(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it must have, what it has) of everything that we would compute differently."""
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            yield WHY_NO_BIAS, f"{name} true"
    if values.get("hidden_act", "silu") != "silu":
        yield "hidden_act silu", repr(values["hidden_act"])
    if values.get("quantization_config"):
        yield "plain weights in bf16, fp16 or fp32", "quantization_config"
    if has_sliding_window(values):
        yield "full attention in every layer", "a sliding window"
    if values["model_type"] == "qwen3_moe" and not values.get("norm_topk_prob"):
        yield "norm_topk_prob true", "false"
    yield from _rotary_obstacles(values)


def has_sliding_window(values: Mapping[str, Any]) -> bool:
    """Whether some layer attends to a window only.

    Qwen3 names a window that `use_sliding_window` must switch on; Mistral has one where config.json does not say null.
    """
    if values["model_type"] == "mistral" and "sliding_window" not in values:
        return True
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        return True
    return values.get("sliding_window") is not None and bool(values.get("use_sliding_window", True))


def _rotary_obstacles(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_TYPES:
        yield f"a rope_type of {', '.join(ROPE_TYPES)}, whose angles do not depend on the text's length", repr(kind)
        return
    for name in ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",):
        if kind != "default" and not isinstance(found.get(name), (int, float)):
            yield f"a number {name} for its rope_type {kind}", repr(found.get(name))
    unknown = sorted(name for name, value in found.items() if name not in ROPE_KEYS and value is not None)
    if unknown:
        yield f"rope settings that are known ({', '.join(sorted(ROPE_KEYS))})", ", ".join(unknown)
    if found.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        yield "rotary positions on whole heads (partial_rotary_factor 1)", "others"
