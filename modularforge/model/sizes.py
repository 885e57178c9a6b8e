"""How large a model is: parameters, active parameters, and FLOPs per token, from the shape alone (no torch)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

from modularforge.config import ModelConfig
from modularforge.model import names


@dataclass(frozen=True)
class Sizes:
    """Counts of one model; FLOPs are of a forward pass per token at full context, a multiply and an add each.

    Of the active parameters, the `routing_parameters` do nothing but choose experts: the routers' rows, and all that
    channels which carry evidence to them add to other matrices.
    """

    parameters: int
    active_parameters: int
    routing_parameters: int
    flops_per_token: int
    training_flops_per_token: int


def attention_parameters(model: ModelConfig) -> int:
    """Weights of the four attention projections of one layer."""
    return 2 * model.width * (model.heads + model.kv_heads) * model.width_per_head


def norm_parameters(model: ModelConfig) -> int:
    """Gains of the RMSNorms of one layer."""
    return 2 * model.width + (2 * model.width_per_head if model.family == "qwen3" else 0)


def ffn_parameters(model: ModelConfig) -> int:
    """Weights of one SwiGLU block."""
    return 3 * model.width * model.ffn_width


def model_sizes(
    model: ModelConfig, vocab_size: int, experts: int = 1, experts_per_token: int = 1, plain: ModelConfig | None = None
) -> Sizes:
    """Sizes of the dense backbone (`experts` = 1) or of the assembled model.

    `plain` is the shape without the channels and heads that carry evidence to the routers; without it there are none.
    The embedding look-up costs no multiplications; the head does. Attention scores count the mean causal length T/2.
    Training costs three forward passes (PaLM, arXiv 2204.02311, appendix B).
    """
    routed = experts > 1
    router = experts * model.width if routed else 0
    per_layer = attention_parameters(model) + norm_parameters(model) + router
    embedding = vocab_size * model.width * (1 if model.tied_head else 2) + model.width
    parameters = embedding + model.layers * (per_layer + experts * ffn_parameters(model))
    active = embedding + model.layers * (per_layer + experts_per_token * ffn_parameters(model))
    scores = model.layers * 2 * 2 * model.heads * model.width_per_head * (model.context_length // 2)
    matrices = model.layers * (attention_parameters(model) + router + experts_per_token * ffn_parameters(model))
    flops = 2 * (matrices + vocab_size * model.width) + scores
    bare = plain or model
    # A dense model with as wide an FFN as a token visits.
    wide = bare.model_copy(update={"ffn_width": experts_per_token * bare.ffn_width})
    routing = active - model_sizes(wide, vocab_size).active_parameters if routed else 0
    return Sizes(parameters, active, routing, flops, 3 * flops)


def with_own_rows(sizes: Sizes, rows_each: int, tied_head: bool, matrix: int, experts: int, visited: int) -> Sizes:
    """The same of a model whose experts have `rows_each` values of embeddings and head each for themselves.

    A token passes those of the slots that it visits, of which the first stands in the place of the backbone's. `matrix`
    is the vocabulary times the width: experts with no more, and an untied head, have no head of their own.
    """
    again, head = visited - 1, matrix if tied_head or rows_each > matrix else 0
    flops = sizes.flops_per_token + 2 * again * head
    return replace(
        sizes,
        parameters=sizes.parameters + experts * rows_each,
        active_parameters=sizes.active_parameters + again * rows_each,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
    )


MOST_LOGITS = 1 << 24
"""Of a step; where there are more, the loss is taken in pieces (`model/head.py`)."""
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Of such a piece: with fewer, products are slow."""


def logits_bytes(vocab_size: int, tokens: int, device: str) -> int:
    """Of the logits of a step's tokens: two arrays of float32 in pieces, else also their gradients."""
    logits = tokens * vocab_size
    return 12 * logits if logits <= MOST_LOGITS else 8 * LOGITS_AT_ONCE[device]


def activation_bytes(model: ModelConfig, tokens: int, item_bytes: int, recomputes: bool = False) -> int:
    """What a step on so many tokens keeps for its backward pass, but logits: an estimate, of dense blocks.

    The residual stream is float32, what matrices read has `item_bytes`. Blocks that are computed again keep their
    input, and one of them is there at a time.
    """
    queries, keys = model.heads * model.width_per_head, model.kv_heads * model.width_per_head
    inside = 2 * model.width + 4 * queries + 4 * keys + 4 * model.ffn_width
    block, stream = 8 * model.width + item_bytes * inside, 4 * model.width
    layers = model.layers * stream + block if recomputes else model.layers * block
    return tokens * (layers + stream + item_bytes * model.width)


def adapter_parameters(model: ModelConfig, modules: Collection[str], rank: int) -> int:
    """Entries of A and B beside the matrices of these names in all layers."""
    shapes = dense_shapes(model, 1)
    return sum(rank * sum(shape) for name, shape in shapes.items() if name.split(".")[-2] in modules)


def shared_parameters(model: ModelConfig, vocab_size: int, parts: Collection[str]) -> int:
    """Weights of these parts of a backbone, as `experts.unfreeze` names them."""
    return sum(
        prod(shape) for name, shape in dense_shapes(model, vocab_size).items() if names.shared_part(name) in parts
    )


@dataclass(frozen=True)
class AdapterCounts:
    """Adapters of so many parameters each, beside one backbone.

    A token visits at most `visited` of them, and runs the feed-forward block `blocks` times: once for each slot that it
    visits where adapters stand in that block.
    """

    parameters: tuple[int, ...]
    visited: int
    blocks: int


def lora_sizes(model: ModelConfig, vocab_size: int, adapters: AdapterCounts) -> Sizes:
    """Sizes of a backbone with adapters. What a training of adapters alone costs is not said: three passes at most."""
    dense, active = model_sizes(model, vocab_size), adapters.visited * max(adapters.parameters, default=0)
    again = (adapters.blocks - 1) * model.layers * 2 * ffn_parameters(model)
    flops = dense.flops_per_token + again + 2 * active
    return Sizes(dense.parameters + sum(adapters.parameters), dense.active_parameters + active, 0, flops, 3 * flops)


def dense_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a backbone; a tied head is none of its own."""
    queries, keys = model.heads * model.width_per_head, model.kv_heads * model.width_per_head
    shapes: dict[str, tuple[int, ...]] = {names.EMBEDDING: (vocab_size, model.width), names.FINAL_NORM: (model.width,)}
    if not model.tied_head:
        shapes[names.HEAD] = (vocab_size, model.width)
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for projection, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (rows, model.width)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (model.width, queries)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (model.width,)
        if model.family == "qwen3":
            for norm in ("q_norm", "k_norm"):
                shapes[f"{prefix}self_attn.{norm}.weight"] = (model.width_per_head,)
        for part in names.PARTS:
            into_stream = part == "w2"
            shape = (model.width, model.ffn_width) if into_stream else (model.ffn_width, model.width)
            shapes[names.dense_ffn(layer, part)] = shape
    return shapes
