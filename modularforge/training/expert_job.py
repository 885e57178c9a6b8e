"""An expert's job: the backbone and one partition in, one FFN per layer with router rows and statistics out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from modularforge.artifacts import Backbone, derived_seed
from modularforge.assembly.small_files import special_tokens
from modularforge.config import Config
from modularforge.data.loader import batches
from modularforge.data.token_files import Tokens
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.folder import save_tensors
from modularforge.routing.gathering import gather_statistics
from modularforge.routing.statistics import EXPERT_NAME, ROUTER_NAME, STATISTICS_NAME, load_statistics, save_statistics
from modularforge.routing.text_counts import COUNTS_NAME, counts_of, save_counts
from modularforge.training.backbone_job import sample_windows
from modularforge.training.distributed import World
from modularforge.training.expert import build_expert, expert_tensors, router_directions
from modularforge.training.job import Job
from modularforge.training.loop import LossFunction, fit
from modularforge.training.losses import AnchoredLoss, language_loss, mean_loss


def train_expert(
    config: Config, index: int, backbone: Backbone, tokens: Tokens, held_out: Tokens, job: Job, world: World
) -> tuple[Decoder, dict[str, float | None]]:
    """A trained expert in its own model, and its final losses (called on every rank).

    Everything random follows from the seed and the index, so the order and company of experts do not matter.
    """
    experts = config.experts
    torch.manual_seed(derived_seed(config.seed, "expert weights", index))
    context, seed = config.model.context_length, derived_seed(config.seed, "expert order", index)

    def batches_from(position: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        ranks, name = (world.rank, world.size), f"partition {index}"
        return batches(tokens, context, experts.batch_size, seed, position, *ranks, name)

    next(batches_from(0))  # a partition that fills no batch is refused before anything is computed
    directions = _directions(config, backbone, tokens, index, world) if experts.anchored else None
    model = build_expert(backbone.tensors, backbone.values, experts, directions)
    loss_of: LossFunction = AnchoredLoss(model, experts.z_loss) if experts.anchored else language_loss

    def validate() -> float:
        return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

    return model, fit(model, loss_of, job, batches_from, validate, world)


def save_expert(
    config: Config, index: int, backbone: Backbone, model: Decoder, tokens: Tokens, folder: Path, world: World
) -> dict[str, object]:
    """Write weights, router rows and statistics of a trained expert; returns facts for the manifest."""
    slot = index + int(config.experts.anchored)  # an anchored expert is assembled behind the public one
    dtype = backbone.tensors[names.dense_ffn(0, names.PARTS[0])].dtype
    ffn, rows = expert_tensors(model, slot, config.experts.anchored, dtype)
    save_tensors(ffn, folder / EXPERT_NAME)
    if rows:
        save_tensors(rows, folder / ROUTER_NAME)
    statistics = gather_statistics(model, partition_sample(config, tokens, index), world.device)
    save_statistics(folder / STATISTICS_NAME, statistics)
    save_counts(folder / COUNTS_NAME, counts_of(config, tokens, model.vocab_size, special_tokens(backbone.artifact)))
    hashes = backbone.artifact.entry("model.safetensors").tensors
    return {
        "index": index,
        "slot": slot,
        "anchored": config.experts.anchored,
        "training_tokens": config.experts.steps * config.experts.batch_size * config.model.context_length,
        "shared_tensors": {name: digest for name, digest in hashes.items() if names.is_shared(name)},
    }


def _directions(config: Config, backbone: Backbone, tokens: Tokens, index: int, world: World) -> list[Tensor]:
    """Where the router rows start: from the backbone's statistics on all text towards those on the partition."""
    own = gather_statistics(backbone.model().float(), partition_sample(config, tokens, index), world.device)
    general = load_statistics(backbone.artifact.local_file(STATISTICS_NAME))
    return router_directions(own.layers, general.layers)


def partition_sample(config: Config, tokens: Tokens, index: int) -> Iterator[Tensor]:
    """Shuffled text of a partition, `experts.statistics_tokens` of it."""
    context = config.model.context_length
    stream = batches(tokens, context, 1, derived_seed(config.seed, "expert statistics", index))
    return sample_windows(stream, config.experts.statistics_tokens // context, config.evaluation.batch_size)
