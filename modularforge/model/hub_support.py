"""What our decoder can compute of other people's models, judged by their config.json; needs no torch.

A model that would silently compute something else is refused in one sentence that names the setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modularforge.config import RopeScalingConfig
from modularforge.errors import DataError
from modularforge.model.hub_fields import is_number, wrong_fields, wrong_shapes

DENSE_TYPES = ("llama", "mistral", "qwen3")
MOE_TYPES = ("mixtral", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {*RopeScalingConfig.model_fields, "type", "rope_theta", "partial_rotary_factor"}

WHY_NO_BIAS = "attention and feed-forward blocks without biases, since the assembled model has no place for them"


def check_supported(values: Mapping[str, Any], origin: str) -> None:
    """Raise DataError unless these values of a config.json describe a model that we compute as transformers does."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in (*DENSE_TYPES, *MOE_TYPES):
        raise DataError(
            f"{origin} must have model_type {', '.join(DENSE_TYPES)}, {' or '.join(MOE_TYPES)}, but has "
            f"{kind!r:.60}; choose a model of the Llama family or Qwen3"
        )
    is_mixture = kind in MOE_TYPES
    for wrong in (
        wrong_fields(values, is_mixture, has_own_width=kind == "qwen3_moe"),
        wrong_shapes(values, is_mixture),
        _obstacles(values),
    ):
        for wish, found in wrong:
            raise DataError(f"{origin} must have {wish}, but has {found:.200}; mend it, or choose another model")


def _obstacles(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it must have, what it has) of everything that we would compute differently."""
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            yield WHY_NO_BIAS, f"{name} true"
    if values.get("hidden_act", "silu") != "silu":
        yield "hidden_act silu", f"{values['hidden_act']!r:.60}"
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
        yield (
            f"a rope_type of {', '.join(ROPE_TYPES)}, whose angles do not depend on the text's length",
            f"{kind!r:.60}",
        )
        return
    for name in ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",):
        if kind != "default" and not is_number(found.get(name)):
            yield f"a number {name} for its rope_type {kind}", f"{found.get(name)!r:.60}"
    unknown = sorted(name for name, value in found.items() if name not in ROPE_KEYS and value is not None)
    if unknown:
        yield f"rope settings that are known ({', '.join(sorted(ROPE_KEYS))})", ", ".join(map(_shown, unknown))
    if found.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        yield "rotary positions on whole heads (partial_rotary_factor 1)", "others"


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)
