"""How large a model is: parameters, active parameters, and FLOPs per token, from the shape alone (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from modularforge.config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """Counts of one model; FLOPs are of a forward pass per token at full context, a multiply and an add each."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    training_flops_per_token: int


def attention_parameters(model: ModelConfig) -> int:
    """Weights of the four attention projections of one layer."""
    head_width = model.width // model.heads
    return 2 * model.width * model.heads * head_width + 2 * model.width * model.kv_heads * head_width


def ffn_parameters(model: ModelConfig) -> int:
    """Weights of one SwiGLU block."""
    return 3 * model.width * model.ffn_width


def model_sizes(model: ModelConfig, vocab_size: int, experts: int = 1, experts_per_token: int = 1) -> Sizes:
    """Sizes of the dense backbone (`experts` = 1) or of the assembled model.

    The embedding look-up costs no multiplications; the head does. Attention scores count the mean causal length T/2.
    Training costs three forward passes (PaLM, arXiv 2204.02311, appendix B).
    """
    routed = experts > 1
    router = experts * model.width if routed else 0
    per_layer = attention_parameters(model) + 2 * model.width + router
    embedding = vocab_size * model.width * (1 if model.tied_head else 2) + model.width
    parameters = embedding + model.layers * (per_layer + experts * ffn_parameters(model))
    active = embedding + model.layers * (per_layer + experts_per_token * ffn_parameters(model))
    scores = model.layers * 2 * 2 * model.width * (model.context_length // 2)
    matrices = model.layers * (attention_parameters(model) + router + experts_per_token * ffn_parameters(model))
    flops = 2 * (matrices + vocab_size * model.width) + scores
    return Sizes(parameters, active, flops, 3 * flops)
