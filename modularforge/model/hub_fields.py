"""Types and ranges of what we read in somebody's config.json: no later line meets a value it cannot compute with.

Numbers have bounds far above any model there is: a shape of 10^30 would be computed with until the memory is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Check = Callable[[Any], bool]
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_COUNT = 1 << 24  # heads, experts, entries of a vocabulary
MAX_POSITIONS = 1 << 31


def _whole(most: int, least: int = 1) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value of config.json is a number that is positive and not beyond all reason."""
    return type(value) in (int, float) and 0 < value < 1e12


def _is_token(value: Any) -> bool:
    return _whole(MAX_COUNT, least=-1)(value)  # Llama 2 says -1 where it has no such token


NEEDED = {
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_COUNT,
    "vocab_size": MAX_COUNT,
    "max_position_embeddings": MAX_POSITIONS,
}
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob")
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
