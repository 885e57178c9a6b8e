"""The backbone's job: random weights in, a Hugging Face folder and router statistics out."""

# B batch  T tokens

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modularforge.artifacts import derived_seed
from modularforge.assembly.statistics import STATISTICS_NAME, save_statistics
from modularforge.config import Config
from modularforge.data.tokenizer import save_tokenizer
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.folder import backbone_tensors, save_tensors
from modularforge.model.hub_config import CONFIG_NAME, GENERATION_NAME, backbone_config, generation_config, write_json
from modularforge.model.sizes import model_sizes
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import Batch, fit
from modularforge.training.losses import language_loss
from modularforge.training.statistics import gather_statistics


def train_backbone(
    config: Config,
    vocab_size: int,
    job: Job,
    batches_from: Callable[[int], Iterator[Batch]],
    validate: Callable[[Decoder], float],
    world: World,
) -> tuple[Decoder, dict[str, float | None]]:
    """A trained backbone and its final losses (called on every rank).

    `batches_from(position)` yields this rank's share of each batch from that position on.
    """
    torch.manual_seed(derived_seed(config.seed, "backbone weights"))
    model = build_backbone(config.model, vocab_size)
    losses = fit(model, language_loss, job, batches_from, lambda: validate(model), world)
    return model, losses


def save_backbone(
    config: Config,
    model: Decoder,
    folder: Path,
    tokenizer: Tokenizer | None,
    sample: Iterable[Tensor],
    world: World,
) -> dict[str, object]:
    """Write a model folder that transformers loads, and the statistics of `sample` (batches of ids [B, T]).

    Returns facts for the manifest.
    """
    save_tensors(backbone_tensors(model), folder / "model.safetensors")
    write_json(folder / CONFIG_NAME, backbone_config(model.config, model.vocab_size))
    write_json(folder / GENERATION_NAME, generation_config())
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, model.config.context_length)
    save_statistics(folder / STATISTICS_NAME, gather_statistics(model, sample, world.device))
    sizes = model_sizes(model.config, model.vocab_size)
    tokens = config.backbone.steps * config.backbone.batch_size * config.model.context_length
    return {"parameters": sizes.parameters, "training_tokens": tokens}


def sample_windows(stream: Iterator[Batch], windows: int, batch_size: int) -> Iterator[Tensor]:
    """Inputs of about `windows` windows, from a stream of single ones, in batches [B, T]."""
    for _ in range(max(1, windows // batch_size)):
        yield torch.cat([inputs_1T for inputs_1T, _, _ in itertools.islice(stream, batch_size)])
