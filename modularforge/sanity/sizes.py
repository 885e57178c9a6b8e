"""How large a check may be: the real shape where the machine can carry it, else a small one of the same kind."""

from __future__ import annotations

import torch

from modularforge.config import Config, ModelConfig
from modularforge.model.sizes import model_sizes

CPU_PARAMETERS = 100_000_000
GPU_BYTES_PER_PARAMETER = 24
SMALL_VOCABULARY = 512


def fits(config: Config, vocab_size: int) -> bool:
    """Whether the assembled model can be run forward and backward here within seconds."""
    parameters = model_sizes(config.model, vocab_size, config.assembled_experts, config.assembly.experts_per_token)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return parameters.parameters * GPU_BYTES_PER_PARAMETER < free
    return parameters.parameters <= CPU_PARAMETERS


def small_model(model: ModelConfig, width: int) -> ModelConfig:
    """The same kind of model with 2 layers, 4 heads and short contexts."""
    return model.model_copy(
        update={
            "width": width,
            "layers": 2,
            "heads": 4,
            "kv_heads": 4 if model.kv_heads == model.heads else 2,
            "ffn_width": 8 * (width // 3),
            "context_length": min(64, model.context_length),
            "pretrained": None,
            "head_width": None,
            "max_positions": None,
        }
    )
