"""Whether blocks are computed again in the backward pass instead of being kept, with the same bits for values and
gradients. A speech model's frozen decoder keeps its own.
"""

from __future__ import annotations

import torch

from modularforge.experts.trainable import Trainable
from modularforge.model.backbone import Decoder
from modularforge.model.shards import own_piece
from modularforge.model.sizes import activation_bytes, logits_bytes
from modularforge.training.distributed import World
from modularforge.training.job import Job

SHARE = 0.9  # of a GPU's memory; the rest is fragments, and what libraries take


def choose_recompute(trainable: Trainable, job: Job, world: World) -> None:
    """Let the decoders of a job's model keep or recompute their blocks, as `training.recompute` says."""
    for module in trainable.model.modules():
        if isinstance(module, Decoder):
            module.recomputes = _is_wanted(module, trainable, job, world)


def _is_wanted(decoder: Decoder, trainable: Trainable, job: Job, world: World) -> bool:
    if job.training.recompute != "auto" or world.device.type != "cuda":
        return job.training.recompute == "blocks"
    _, memory = torch.cuda.mem_get_info(world.device)
    return step_bytes(decoder, trainable, job.tokens // world.size) > SHARE * memory


def step_bytes(decoder: Decoder, trainable: Trainable, tokens: int) -> int:
    """What a step on so many tokens of this process takes, an estimate: all weights, AdamW, activations, logits."""
    weights = sum(own_piece(weight).numel() * weight.element_size() for weight in trainable.model.parameters())
    learns = sum(own_piece(weight).numel() for weight in trainable.parameters.values())
    logits = logits_bytes(decoder.vocab_size, tokens, "cuda")
    # Of what learns, a gradient and two moments.
    return weights + 12 * learns + activation_bytes(decoder.config, tokens, 2) + logits
