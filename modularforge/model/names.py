"""The only place that knows tensor names: Hugging Face's own, Llama for the backbone, Mixtral for the assembled model.

SwiGLU parts have two spellings: gate, up and down projection in Llama are w1, w3 and w2 in Mixtral.
"""

from __future__ import annotations

import re

PART_OF_LLAMA = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LLAMA_OF_PART = {part: name for name, part in PART_OF_LLAMA.items()}
PARTS = ("w1", "w2", "w3")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
TOKEN_COUNTS = "tokens"  # in a statistics file: how often each token of the vocabulary occurs

_DENSE = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_EXPERT = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")
_GATE = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight$")


def dense_ffn(layer: int, part: str) -> str:
    """Name of one matrix of the backbone's feed-forward block; `part` is w1, w2 or w3."""
    return f"model.layers.{layer}.mlp.{LLAMA_OF_PART[part]}.weight"


def expert_ffn(layer: int, slot: int, part: str) -> str:
    """Name of one matrix of the expert in `slot` of the assembled model."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{slot}.{part}.weight"


def gate(layer: int) -> str:
    """Name of the router matrix of a layer, one row per expert."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def first_moment(layer: int) -> str:
    """Name, in a statistics file, of the sum of a layer's router inputs."""
    return f"layers.{layer}.sum"


def second_moment(layer: int) -> str:
    """Name, in a statistics file, of the sum of outer products of a layer's router inputs."""
    return f"layers.{layer}.outer"


def is_dense_ffn(name: str) -> bool:
    """Whether the name is a matrix of the backbone's feed-forward block (the public FFN)."""
    return _DENSE.match(name) is not None


def is_gate(name: str) -> bool:
    """Whether the name is a router matrix."""
    return _GATE.match(name) is not None


def is_norm(name: str) -> bool:
    """Whether the name is the gain of an RMSNorm."""
    return name.endswith("norm.weight")


def is_shared(name: str) -> bool:
    """Whether a backbone tensor stays the same in every expert: embeddings, attention, norms, head."""
    return not is_dense_ffn(name)


def expert_position(name: str) -> tuple[int, int, str] | None:
    """(layer, slot, part) of an expert's matrix, or None for other names."""
    match = _EXPERT.match(name)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def dense_to_expert(name: str, slot: int) -> str:
    """The name a feed-forward matrix of the backbone gets as the expert in `slot`; other names stay."""
    match = _DENSE.match(name)
    return expert_ffn(int(match[1]), slot, PART_OF_LLAMA[match[2]]) if match else name


def expert_to_dense(name: str) -> str:
    """The backbone's name for a matrix of any expert; other names stay."""
    position = expert_position(name)
    return dense_ffn(position[0], position[2]) if position else name
