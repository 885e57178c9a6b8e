"""What of a model carries nothing but evidence to its routers: channels and heads that the head never sees."""

# D width  H head width

from __future__ import annotations

import torch

from modularforge.config import ModelConfig
from modularforge.model.backbone import Decoder


def shape_without_channels(decoder: Decoder) -> ModelConfig:
    """The shape without the last channels, where the final norm hides some, and without the heads that write there.

    It is the decoder's own where there are none.
    """
    model = decoder.config
    seen_D = decoder.model.norm.weight.detach().nonzero()
    width = int(seen_D[-1]) + 1 if len(seen_D) else model.width
    if width == model.width:
        return model
    heads = max(_visible_heads(block.self_attn.o_proj.weight.detach()[:width], model) for block in decoder.blocks)
    per_group = model.heads // model.kv_heads
    groups = -(-heads // per_group)
    return model.model_copy(update={"width": width, "heads": groups * per_group, "kv_heads": groups})


def _visible_heads(output_DN: torch.Tensor, model: ModelConfig) -> int:
    """Heads up to the last one whose output reaches a channel that is seen."""
    written = output_DN.reshape(len(output_DN), model.heads, -1).any(dim=2).any(dim=0).nonzero()
    return int(written[-1]) + 1 if len(written) else model.heads
