"""The backbone's job, and how whole trained models are written: as Hugging Face folders, with what routers need."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.assembly.card import copy_text_files
from modularforge.config import Config
from modularforge.data.tokenizer import adopt_tokenizer, save_tokenizer
from modularforge.errors import MismatchError
from modularforge.experts.trainable import Loss, trainable
from modularforge.model import names
from modularforge.model.backbone import Decoder, shaped_backbone
from modularforge.model.deferred import Weights, drawn
from modularforge.model.folder import backbone_tensors, cast_like, load_pretrained, read_tensors, save_tensors
from modularforge.model.hub_config import (
    CONFIG_NAME,
    GENERATION_NAME,
    backbone_config,
    generation_config,
    model_config_of,
    moe_config,
    read_config,
    write_json,
)
from modularforge.model.moe import moe_layers
from modularforge.model.sizes import model_sizes
from modularforge.routing.statistics import STATISTICS_NAME, RouterStatistics, save_statistics
from modularforge.stage_outputs import Backbone, derived_seed
from modularforge.tasks.task import Examples, Validation
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss


def train_backbone(
    config: Config,
    vocab_size: int,
    loss: Loss,
    job: Job,
    examples: Examples,
    held_out: Validation,
    world: World,
    pretrained: Path | None = None,
) -> tuple[Decoder, dict[str, float | None]]:
    """A trained backbone and its final losses (called on every rank).

    Training starts from the model folder `pretrained`, or from random weights.
    """
    torch.manual_seed(derived_seed(config.seed, "backbone weights"))
    if pretrained:
        model, weights = load_pretrained(pretrained), None
    else:
        model, weights = _drawn(config, vocab_size)
    if model.vocab_size < vocab_size:
        raise MismatchError(
            f"{pretrained} must have an entry for each of the tokenizer's {vocab_size} ids, but its vocabulary has "
            f"{model.vocab_size}; use the tokenizer that belongs to it"
        )
    learns = trainable(model, loss, weights=weights)
    losses = fit(learns, examples, job, partial(mean_loss, model, held_out, world), world)
    return model, losses


def _drawn(config: Config, vocab_size: int) -> tuple[Decoder, Weights]:
    found = drawn(partial(shaped_backbone, config.model, vocab_size), config.model.layers)
    return found.model, found.weights


def save_backbone(
    config: Config,
    model: Decoder,
    folder: Path,
    tokenizer: Tokenizer | None,
    statistics: RouterStatistics,
    pretrained: Path | None = None,
) -> dict[str, object]:
    """Write a model folder that transformers loads, and the statistics of what its routers would see.

    What began as the model folder `pretrained` keeps its special tokens, its tokenizer and the type of its weights; the
    bytes of the weights too when they were not trained. Returns facts for the manifest.
    """
    if pretrained is not None:
        _save_pretrained(model, folder, pretrained)
    else:
        save_tensors(backbone_tensors(model), folder / "model.safetensors")
        write_json(folder / CONFIG_NAME, backbone_config(model.config, model.vocab_size))
        write_json(folder / GENERATION_NAME, generation_config())
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder, model.config.positions)
    save_statistics(folder / STATISTICS_NAME, statistics)
    sizes = model_sizes(model.config, model.vocab_size)
    tokens = config.backbone.steps * config.backbone.batch_size * config.model.context_length
    return {"parameters": sizes.parameters, "training_tokens": tokens}


def save_trained_on(model: Decoder, backbone: Backbone, folder: Path) -> None:
    """Write a backbone that was trained on, or a wider one made of it: in its types, with its tokenizer."""
    types = {name: tensor.dtype for name, tensor in backbone.tensors.items()}
    save_tensors(cast_like(backbone_tensors(model), types), folder / WEIGHTS_NAME)
    if model.config.ffn_width == model_config_of(backbone.values).ffn_width:
        (folder / CONFIG_NAME).write_bytes(backbone.artifact.read_bytes(CONFIG_NAME))
    else:
        write_json(folder / CONFIG_NAME, backbone_config(model.config, model.vocab_size, backbone.values))
    copy_text_files(backbone.artifact, folder)


def save_mixture(model: Decoder, backbone: Backbone, folder: Path) -> None:
    """Write a mixture with the backbone's tokenizer: weights in the type of the backbone's, router rows in float32."""
    dtype, layer = backbone.tensors[names.EMBEDDING].dtype, moe_layers(model)[0]
    tensors = {name: t if names.is_gate(name) else t.to(dtype) for name, t in backbone_tensors(model).items()}
    save_tensors(tensors, folder / WEIGHTS_NAME)
    shape = model.config, model.vocab_size, len(layer.experts), layer.experts_per_token
    write_json(folder / CONFIG_NAME, moe_config(*shape, backbone.values))
    copy_text_files(backbone.artifact, folder)


def _save_pretrained(model: Decoder, folder: Path, pretrained: Path) -> None:
    """Weights in the type they came in: those that were not trained get their very bytes back."""
    types = {name: tensor.dtype for name, tensor in read_tensors(pretrained).items()}
    save_tensors(cast_like(backbone_tensors(model), types), folder / "model.safetensors")
    values = read_config(pretrained)
    write_json(folder / CONFIG_NAME, backbone_config(model.config, model.vocab_size, values))
    if (pretrained / GENERATION_NAME).is_file():
        shutil.copyfile(pretrained / GENERATION_NAME, folder / GENERATION_NAME)
    else:
        write_json(folder / GENERATION_NAME, generation_config(values))
    adopt_tokenizer(pretrained, folder)
