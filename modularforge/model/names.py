"""The only place that knows tensor names: Hugging Face's own, Llama or Qwen3 for the backbone, which differ in no name
of a feed-forward block, and Mixtral or Qwen3-MoE for the assembled model.

SwiGLU parts have two spellings: gate, up and down projection are w1, w3 and w2 in Mixtral, and in our code.
Functions that read a name know both kinds; those that make one take the backbone's family.
"""

from __future__ import annotations

import re
from typing import Literal

Family = Literal["llama", "qwen3"]

DENSE_OF_PART = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
PART_OF_DENSE = {name: part for part, name in DENSE_OF_PART.items()}
PARTS = ("w1", "w2", "w3")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

MOE_BLOCK: dict[Family, str] = {"llama": "block_sparse_moe", "qwen3": "mlp"}
"""What the mixture is called in a layer of the assembled model."""

MODULE_GROUPS = ("embedding", "attention", "mlp", "head", "other")
"""The parts of a decoder that people tell apart when they ask what learns; gains of norms are among the others."""
_GROUP_OF_MODULE = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "mlp",
    "block_sparse_moe": "mlp",
    "lm_head": "head",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_DENSE = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_EXPERT = re.compile(
    r"^model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight$"
)
_ATTENTION = re.compile(r"^model\.layers\.\d+\.self_attn\.([qkvo]_proj)\.weight$")
_PEFT = re.compile(r"^base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj)\.lora_([AB])\.weight$")
_GATE = re.compile(r"^model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.gate\.weight$")


def dense_ffn(layer: int, part: str) -> str:
    """Name of one matrix of the backbone's feed-forward block; `part` is w1, w2 or w3."""
    return f"model.layers.{layer}.mlp.{DENSE_OF_PART[part]}.weight"


def expert_ffn(layer: int, slot: int, part: str, family: Family = "llama") -> str:
    """Name of one matrix of the expert in `slot` of the assembled model."""
    spelling = part if family == "llama" else DENSE_OF_PART[part]
    return f"model.layers.{layer}.{MOE_BLOCK[family]}.experts.{slot}.{spelling}.weight"


def gate(layer: int, family: Family = "llama") -> str:
    """Name of the router matrix of a layer, one row per expert."""
    return f"model.layers.{layer}.{MOE_BLOCK[family]}.gate.weight"


def attention(layer: int, part: str) -> str:
    """Name of a layer's q_proj, k_proj, v_proj or o_proj, or of Qwen3's norm over a head's queries or keys (q_norm)."""
    return f"model.layers.{layer}.self_attn.{part}.weight"


def adapter(name: str) -> str:
    """The name that PEFT gives a parameter of an adapter, such as `model.layers.0.mlp.up_proj.lora_A.weight`."""
    return f"base_model.model.{name}"


def adapter_pair(matrix: str) -> tuple[str, str]:
    """The names that PEFT gives A and B of an adapter beside a matrix of the backbone."""
    stem = adapter(matrix.removesuffix(".weight"))
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def adapted(name: str) -> tuple[str, str] | None:
    """(the backbone's matrix, A or B) for a tensor of a PEFT adapter on our decoder, or None for other names."""
    match = _PEFT.match(name)
    return (f"{match[1]}.weight", match[2]) if match else None


def is_dense_ffn(name: str) -> bool:
    """Whether the name is a matrix of the backbone's feed-forward block (the public FFN)."""
    return _DENSE.match(name) is not None


def dense_part(name: str) -> str:
    """w1, w2 or w3 for a matrix of the backbone's feed-forward block, empty for other names."""
    match = _DENSE.match(name)
    return PART_OF_DENSE[match[2]] if match else ""


def is_gate(name: str) -> bool:
    """Whether the name is a router matrix."""
    return _GATE.match(name) is not None


def is_norm(name: str) -> bool:
    """Whether the name is the gain of an RMSNorm."""
    return name.endswith("norm.weight")


def is_stream_norm(name: str) -> bool:
    """Whether the name is the gain of a norm over the residual stream, not one over the queries or keys of a head."""
    return name == FINAL_NORM or name.endswith("layernorm.weight")


def attention_part(name: str) -> str:
    """q_proj, k_proj, v_proj or o_proj for an attention matrix, empty for other names."""
    match = _ATTENTION.match(name)
    return match[1] if match else ""


def is_shared(name: str) -> bool:
    """Whether a backbone tensor stays the same in every expert: embeddings, attention, norms, head."""
    return not is_dense_ffn(name)


def shared_part(name: str) -> str:
    """embeddings, head, attention or norms for a tensor that experts share, empty for other names."""
    if is_norm(name):
        return "norms"
    return {EMBEDDING: "embeddings", HEAD: "head"}.get(name) or ("attention" if attention_part(name) else "")


def own_row(expert: int, name: str) -> str:
    """Embeddings or head of one expert, in the file of those that experts have for themselves."""
    return f"{expert:05d}.{name}"


def is_redundant(name: str, tied_head: bool) -> bool:
    """Whether a pretrained file may hold the tensor although the model does not need it: a tied head, old positions."""
    return (tied_head and name == HEAD) or name.endswith("rotary_emb.inv_freq")


def module_group(name: str) -> tuple[str, int | None]:
    """The group of `MODULE_GROUPS` and the layer of a parameter; an adapter's are those of the matrix that it changes.

    Names may have a prefix and an ending, as PEFT's have (`base_model.model.model.layers.3.mlp.up_proj.lora_A.weight`).
    """
    found = [group for module, group in _GROUP_OF_MODULE.items() if module in name.split(".")]
    layer = _LAYER.search(name)
    return (found[0] if found else "other"), int(layer[1]) if layer else None


def expert_position(name: str) -> tuple[int, int, str] | None:
    """(layer, slot, part) of an expert's matrix, or None for other names."""
    match = _EXPERT.match(name)
    return (int(match[1]), int(match[2]), PART_OF_DENSE.get(match[3], match[3])) if match else None


def dense_to_expert(name: str, slot: int, family: Family = "llama") -> str:
    """The name a feed-forward matrix of the backbone gets as the expert in `slot`; other names stay."""
    match = _DENSE.match(name)
    return expert_ffn(int(match[1]), slot, PART_OF_DENSE[match[2]], family) if match else name


def expert_to_dense(name: str) -> str:
    """The backbone's name for a matrix of any expert; other names stay."""
    position = expert_position(name)
    return dense_ffn(position[0], position[2]) if position else name


def family_of(model_type: str) -> Family:
    """The backbone's family by the `model_type` of a config.json, of a backbone or of an assembled model."""
    return "qwen3" if model_type.startswith("qwen3") else "llama"
