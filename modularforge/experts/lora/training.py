"""A LoRA expert's job: adapters beside the frozen backbone, in phases; and how the expert runs alone.

Parts of the backbone that `experts.unfreeze` names learn beside the adapters, in every phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints import Artifact
from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.assembly.card import copy_text_files
from modularforge.assembly.plan import spans_of
from modularforge.experts.calibrated import calibrates as calibrates
from modularforge.experts.kind import ExpertJob
from modularforge.experts.lora.adapters import Mean, adapter_of, base_name
from modularforge.experts.lora.phases import Phase, phase_at, phases_of
from modularforge.experts.sums import save_sums
from modularforge.experts.trainable import Loss, ParameterGroup, Trainable
from modularforge.experts.unfrozen import load_unfrozen, mean_unfrozen, save_unfrozen, unfreeze
from modularforge.model.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS_FOLDER,
    ADAPTERS_NAME,
    AdapterShape,
    Composite,
    adapter_config,
    composite_json,
    parse_adapter_config,
    shape_of,
)
from modularforge.model.backbone import Decoder
from modularforge.model.folder import fill, save_tensors
from modularforge.model.hub_config import CONFIG_NAME, write_json
from modularforge.model.lora import adapter_parameters, adapter_tensors, add_adapters, with_adapter
from modularforge.ranks import own_rank
from modularforge.stage_outputs import Backbone, derived_seed
from modularforge.training.precision import keeps_types


def prepare(expert: ExpertJob) -> Trainable:
    """The adapters beside the backbone, which is frozen and stays in its own type."""
    config, model = expert.config, expert.backbone.model()
    lora = config.experts.lora
    if config.experts.unfreeze:
        # What learns is float32, and so is then what it meets: all of the model, or the stream where autocast casts.
        keeps = keeps_types(config.training, expert.device)
        model = model if keeps else model.float()
        model.has_half_blocks = model.has_float_stream = keeps
    phases = phases_of(lora, config.experts.steps, model.config.layers)
    seed = derived_seed(config.seed, "lora dropout", expert.index)
    found = adapters(model, shape_of(lora), expert.task.loss, phases, seed)
    return replace(found, groups=[*found.groups, *unfreeze(model, config.experts)])


def adapters(model: Decoder, shape: AdapterShape, loss: Loss, phases: Sequence[Phase], seed: int) -> Trainable:
    """What trains new adapters beside a model: all are in the optimizer from the start, whichever learn at a step.

    Paused ones get no gradient, so that AdamW leaves them and their moments alone, decay included.
    """
    learns, rank = add_adapters(model, shape), own_rank()[0]
    at = {"phase": 0}

    def before_step(step: int) -> None:
        at["phase"], phase = phase_at(phases, step)
        for name, weight in adapter_parameters(model).items():  # other objects once the model lies in pieces
            weight.requires_grad_(phase.trains(name))
        if shape.dropout:  # it follows from the step, on every device, so that a resumed job drops the same
            torch.manual_seed(derived_seed(seed, step, rank))

    def observations() -> Mapping[str, float]:
        return {"phase": float(at["phase"])} if len(phases) > 1 else {}

    before_step(0)
    return Trainable(model, loss, [ParameterGroup(learns)], before_step, observations)


def save(expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write the adapter as PEFT does, statistics and counts; returns facts for the manifest."""
    assert isinstance(model, Decoder)
    backbone, shape = expert.backbone, shape_of(expert.config.experts.lora)
    write_adapter(model, shape, backbone.artifact, folder)
    types = {name: tensor.dtype for name, tensor in backbone.tensors.items()} if expert.config.experts.unfreeze else {}
    save_unfrozen(model, expert.config.experts, types, folder)
    count = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    return {"trained_parameters": count, **save_sums(expert, model, folder)}


def write_adapter(model: Decoder, shape: AdapterShape, backbone: Artifact, folder: Path) -> None:
    """Write a model's adapters into a folder from which PEFT loads them."""
    save_tensors(adapter_tensors(model), folder / ADAPTER_WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, adapter_config(shape, base_name(backbone)))


def write_beside(model: Decoder, shape: AdapterShape, backbone: Artifact, folder: Path) -> None:
    """Write all of a model folder but the weights, which are the backbone's: what one adapter beside it makes of it."""
    composite = Composite((f"{ADAPTERS_FOLDER}/joint",), 1, public=False, choice=None)
    write_adapter(model, shape, backbone, folder / composite.folders[0])
    write_json(folder / ADAPTERS_NAME, composite_json(composite))
    (folder / CONFIG_NAME).write_bytes(backbone.read_bytes(CONFIG_NAME))
    copy_text_files(backbone, folder)


def load(backbone: Backbone, artifact: Artifact) -> Decoder:
    """The backbone with one expert's adapter."""
    shape = parse_adapter_config(artifact.read_bytes(ADAPTER_CONFIG), artifact.file_url(ADAPTER_CONFIG))
    tensors = load_file(artifact.local_file(ADAPTER_WEIGHTS))
    return with_adapter(_changed(backbone, load_unfrozen(artifact)), shape, tensors, artifact.file_url(ADAPTER_WEIGHTS))


def soup(backbone: Backbone, experts: Sequence[Artifact]) -> Decoder:
    """The backbone with the mean of what the adapters add."""
    spans = spans_of(backbone.artifact, WEIGHTS_NAME)
    mean = Mean([adapter_of(expert, spans) for expert in experts])
    tensors = {name: torch.from_numpy(matrix) for name, matrix in mean.tensors().items()}
    model = _changed(backbone, mean_unfrozen(backbone.tensors, experts))
    return with_adapter(model, mean.shape, tensors, "the mean of the adapters")


def _changed(backbone: Backbone, shared: Mapping[str, Tensor]) -> Decoder:
    """The backbone with some of its tensors changed."""
    return fill(backbone.model(), {**backbone.tensors, **shared}) if shared else backbone.model()
