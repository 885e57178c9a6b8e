"""What our decoder can compute of other people's models, judged by their config.json; needs no torch.

A model that would silently compute something else is refused in one sentence that names the setting. Types and ranges
are checked first, so that no later line meets a value it cannot compute with. Numbers have bounds far above any model
there is: a shape of 10^30 would be computed with until the memory is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modularforge.config import RopeScalingConfig
from modularforge.errors import DataError

DENSE_TYPES = ("llama", "mistral", "qwen3")
SPEECH_TYPE = "modularforge_speech"
MOE_TYPES = ("mixtral", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {*RopeScalingConfig.model_fields, "type", "rope_theta", "partial_rotary_factor"}

WHY_NO_BIAS = "attention and feed-forward blocks without biases, since the assembled model has no place for them"
Check = Callable[[Any], bool]
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_COUNT = 1 << 24  # heads, experts, entries of a vocabulary
MAX_POSITIONS = 1 << 31
NEEDED = {
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_COUNT,
    "vocab_size": MAX_COUNT,
    "max_position_embeddings": MAX_POSITIONS,
}
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob")


def check_supported(values: Mapping[str, Any], origin: str) -> None:
    """Raise DataError unless these values of a config.json describe a model that we compute as transformers does."""
    kind = values.get("model_type")
    if kind == SPEECH_TYPE:
        raise DataError(
            f"{origin} must be of a model that reads text, but is of a speech model; `modularforge transcribe --model` "
            "writes down recordings with it, and `modularforge analyze` shows its gates"
        )
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
            raise DataError(f"{origin} must have {wish}, but has {found:.200}; fix it, or choose another model")


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


def _whole(most: int, least: int = 1) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value of config.json is a number that is positive and not beyond all reason."""
    return type(value) in (int, float) and 0 < value < 1e12


def _is_token(value: Any) -> bool:
    return _whole(MAX_COUNT, least=-1)(value)  # Llama 2 says -1 where it has no such token


OPTIONAL: dict[str, tuple[str, Check]] = {
    "num_key_value_heads": ("a positive number", _whole(MAX_COUNT)),
    "head_dim": ("an even positive number", lambda value: _whole(MAX_WIDTH)(value) and value % 2 == 0),
    "rope_theta": ("a positive number", is_number),
    "rms_norm_eps": ("a positive number", is_number),
    "rope_scaling": ("an object", lambda value: isinstance(value, dict)),
    "rope_parameters": ("an object", lambda value: isinstance(value, dict)),
    "layer_types": ("a list of texts", lambda value: isinstance(value, list) and all(type(v) is str for v in value)),
    "eos_token_id": (
        "a token id or a list of them",
        lambda value: all(map(_is_token, value)) if isinstance(value, list) else _is_token(value),
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ("a token id", _is_token)),
    **{name: ("a text", lambda value: isinstance(value, str)) for name in ("hidden_act", "dtype", "torch_dtype")},
    **{name: ("true or false", lambda value: isinstance(value, bool)) for name in FLAGS},
}


def wrong_fields(values: Mapping[str, Any], is_mixture: bool, has_own_width: bool) -> Iterator[tuple[str, str]]:
    """(what it must have, what it has) of every value that is none; `has_own_width`: of the experts' FFNs (Qwen3)."""
    needed = {**NEEDED, "num_experts_per_tok": MAX_COUNT} if is_mixture else dict(NEEDED)
    if is_mixture:
        needed["num_local_experts" if values.get("num_local_experts") is not None else "num_experts"] = MAX_COUNT
    if has_own_width:
        needed["moe_intermediate_size"] = MAX_WIDTH
    for name, most in needed.items():
        if not _whole(most)(values.get(name)):
            yield f"a positive number {name}", f"{values.get(name)!r:.60}"
    for name, (wish, is_right) in OPTIONAL.items():
        if values.get(name) is not None and not is_right(values[name]):
            yield f"{wish} as {name}", f"{values[name]!r:.60}"


def wrong_shapes(values: Mapping[str, Any], is_mixture: bool) -> Iterator[tuple[str, str]]:
    """The same of sizes that do not fit each other."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads:
        yield "query heads that are a multiple of its num_key_value_heads", f"{heads} and {kv_heads}"
    if values.get("head_dim") is None and width % (2 * heads):
        yield "heads of an even width (hidden_size / num_attention_heads)", f"{width} / {heads}"
    experts: Any = values.get("num_local_experts") or values.get("num_experts")
    if is_mixture and experts < values["num_experts_per_tok"]:
        yield "at least num_experts_per_tok experts", f"{experts} and {values['num_experts_per_tok']}"
