"""An FFN expert's job: what is frozen, what learns, and what the job leaves behind; and how the expert runs alone."""

# D width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints import Artifact
from modularforge.config import ExpertsConfig
from modularforge.experts.calibrated import calibrates as calibrates
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.experts.kind import ExpertJob
from modularforge.experts.sums import save_sums
from modularforge.experts.trainable import Trainable, trainable
from modularforge.experts.unfrozen import load_unfrozen, mean_unfrozen, save_unfrozen, unfreeze
from modularforge.facts import fact
from modularforge.model import names
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.deferred import Deferred, drawn_weight, read
from modularforge.model.folder import Weight, fill, save_tensors
from modularforge.model.hub_config import model_config_of
from modularforge.model.meta import without_weights
from modularforge.model.moe import build_anchored_pair
from modularforge.model.shards import host_tensors
from modularforge.routing.statistics import (
    ROUTER_NAME,
    STATISTICS_NAME,
    LayerStatistics,
    load_statistics,
)
from modularforge.stage_outputs import Backbone
from modularforge.training.distributed import World
from modularforge.training.losses import RoutedLoss
from modularforge.training.precision import keeps_types, measuring
from modularforge.training.sharding import spread


def prepare(expert: ExpertJob) -> Trainable:
    """The expert in its own model, all else frozen but for what `experts.unfreeze` names, at a rate of its own."""
    settings, backbone, task = expert.config.experts, expert.backbone, expert.task
    directions = _directions(expert) if settings.anchored else None
    keeps = keeps_types(expert.config.training, expert.device)
    begun = expert_model(backbone.tensors, backbone.values, settings, directions, keeps)
    loss = RoutedLoss(begun.model, task.loss, settings.z_loss) if settings.anchored else task.loss
    found = trainable(begun.model, loss, weights=begun.weights)
    return replace(found, groups=[*found.groups, *unfreeze(begun.model, settings)])


def save(expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write weights, router rows, statistics and counts of a trained expert; returns facts for the manifest."""
    assert isinstance(model, Decoder)
    backbone, anchored = expert.backbone, expert.config.experts.anchored
    slot = expert.index + int(anchored)  # an anchored expert is assembled behind the public one
    dtype = backbone.tensors[names.dense_ffn(0, names.PARTS[0])].dtype
    ffn, rows = expert_tensors(model, slot, anchored, dtype)
    save_tensors(ffn, folder / EXPERT_NAME)
    if rows:
        save_tensors(rows, folder / ROUTER_NAME)
    types = {name: tensor.dtype for name, tensor in backbone.tensors.items()}
    save_unfrozen(model, expert.config.experts, types, folder)
    return {"slot": slot, "anchored": anchored, **save_sums(expert, model, folder)}


def load(backbone: Backbone, artifact: Artifact) -> Decoder:
    """An expert's own model on this backbone."""
    tensors = load_file(artifact.local_file(EXPERT_NAME))
    anchored = fact(artifact, "anchored")
    if anchored:
        tensors.update(load_file(artifact.local_file(ROUTER_NAME)))
    return load_expert({**backbone.tensors, **load_unfrozen(artifact)}, backbone.values, tensors, anchored)


def soup(backbone: Backbone, experts: Sequence[Artifact]) -> Decoder:
    """The backbone with the mean of what the experts trained; two are in memory at a time."""
    total: dict[str, Tensor] = {}
    for expert in experts:
        for name, tensor in load_file(expert.local_file(EXPERT_NAME)).items():
            dense = names.expert_to_dense(name)
            total[dense] = total[dense] + tensor if dense in total else tensor.float()
    mean = {name: (tensor / len(experts)).to(backbone.tensors[name].dtype) for name, tensor in total.items()}
    return fill(backbone.model(), {**backbone.tensors, **mean, **mean_unfrozen(backbone.tensors, experts)})


def expert_model(
    backbone: dict[str, Tensor],
    values: dict[str, Any],
    experts: ExpertsConfig,
    directions: list[Tensor] | None,
    keeps_types: bool = False,
) -> Deferred:
    """A float32 model in which only the new FFN (and its router rows when anchored) require gradients.

    `backbone` and `values` are the tensors and config.json of the backbone; `directions`, one [D] per layer, are where
    the router rows start (anchored experts only). With `keeps_types` what is frozen stays in the type that it is stored
    in, for autocast, which casts it to bf16 in either case: the bits are the same. So does what learns, until `fit`.
    A fresh expert is drawn from torch's global generator, where the weights are made.
    """
    family = names.family_of(values["model_type"])
    dense = {name: tensor for name, tensor in backbone.items() if names.is_dense_ffn(name)}
    start = {names.dense_to_expert(name, 1, family): tensor for name, tensor in dense.items()}
    for layer, direction_D in enumerate(directions or []):
        start[names.gate(layer, family)] = direction_D[None].clone()
    model = _empty(values, experts.anchored)
    model.has_half_blocks = model.has_float_stream = keeps_types
    model.requires_grad_(False)
    for block in model.blocks:
        learns = ("experts.1", "gate") if experts.anchored else ("",)
        for name in learns:
            block.ffn.get_submodule(name).requires_grad_(True)
    tensors = own_tensors(backbone, start, experts.anchored, family)
    found = read(model, tensors, None if keeps_types else torch.float32)
    return _drawn_anew(found) if experts.init == "fresh" else found


def _drawn_anew(expert: Deferred) -> Deferred:
    """The expert with a new FFN in float32, whose rows for routers stay."""
    model, weights = expert.model, dict(expert.weights)
    for name, weight in model.named_parameters():
        if weight.requires_grad and not names.is_gate(name):
            weight.data = weight.data.float()
            weights[name] = drawn_weight(name, weight, model.config.layers)
    return replace(expert, weights={name: weights[name] for name, _ in model.named_parameters()})


def load_expert(
    backbone: dict[str, Tensor], values: dict[str, Any], expert: dict[str, Tensor], anchored: bool
) -> Decoder:
    """An expert's own model: the pair of public FFN and expert when anchored, else the backbone with its FFN.

    `backbone` and `values` are the tensors and config.json of the backbone, `expert` the tensors the job wrote.
    """
    decoder = _empty(values, anchored)
    return fill(decoder, own_tensors(backbone, expert, anchored, decoder.config.family))


def _empty(values: dict[str, Any], anchored: bool) -> Decoder:
    """An expert's own model on the meta device."""
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    with without_weights():
        return build_anchored_pair(model, vocab_size) if anchored else build_backbone(model, vocab_size)


def own_tensors(
    backbone: dict[str, Tensor], expert: dict[str, Tensor], anchored: bool, family: names.Family
) -> dict[str, Tensor]:
    """Names and tensors of an expert's own model, from the backbone's and the expert's."""
    if not anchored:
        dense = {names.expert_to_dense(name): tensor for name, tensor in expert.items() if not names.is_gate(name)}
        return {**backbone, **dense}
    tensors = {names.dense_to_expert(name, 0, family): tensor for name, tensor in backbone.items()}
    for name, tensor in expert.items():
        position = names.expert_position(name)
        tensors[names.expert_ffn(position[0], 1, position[2], family) if position else name] = tensor
    return tensors


def _directions(expert: ExpertJob) -> list[Tensor]:
    """Where the router rows start: from the backbone's statistics on all text towards those on the partition."""
    training, world = expert.config.training, expert.world or World(device=expert.device)
    backbone = Backbone(expert.backbone.artifact)  # as it is stored, whatever a round has made of it
    plain = read(_empty(backbone.values, anchored=False), backbone.tensors, torch.float32)
    with measuring(training, expert.device):
        own = expert.task.statistics(spread(plain, training, world), expert.examples, expert.device)
    general = load_statistics(expert.backbone.artifact.local_file(STATISTICS_NAME))
    return router_directions(own.layers, general.layers)


def router_directions(own: Sequence[LayerStatistics], general: Sequence[LayerStatistics]) -> list[Tensor]:
    """Where each layer's router row starts: the unit vector from the mean input of all text to the partition's."""
    directions = []
    for mine, all_text in zip(own, general, strict=True):
        away_D = mine.mean_D - all_text.mean_D
        unit_D = away_D / max(float(np.linalg.norm(away_D)), 1e-12)
        directions.append(torch.from_numpy(unit_D).float())
    return directions


def expert_tensors(
    model: Decoder, slot: int, anchored: bool, dtype: torch.dtype
) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """What an expert is: its FFN under the names of `slot`, in the type of the backbone's, and its router rows [1, D].

    Rows stay float32; there are none when the expert is not anchored.
    """
    ffn: dict[str, Weight] = {}
    rows: dict[str, Weight] = {}
    family, state = model.config.family, model.state_dict()
    own = {name for name in state if names.expert_position(name) or names.is_gate(name) or names.is_dense_ffn(name)}
    for name, tensor in host_tensors({name: tensor for name, tensor in state.items() if name in own}).items():
        position = names.expert_position(name)
        if names.is_gate(name):
            rows[name] = tensor
        elif position and position[1] == 1:
            ffn[names.expert_ffn(position[0], slot, position[2], family)] = tensor.to(dtype).contiguous()
        elif names.is_dense_ffn(name) and not anchored:
            ffn[names.dense_to_expert(name, slot, family)] = tensor.to(dtype).contiguous()
    return ffn, rows
