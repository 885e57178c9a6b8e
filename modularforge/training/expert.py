"""The model an expert's job trains: what is frozen, what learns, and what the job leaves behind."""

# D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modularforge.config import ExpertsConfig
from modularforge.model import names
from modularforge.model.backbone import Decoder, initialise
from modularforge.model.folder import load_expert
from modularforge.routing.statistics import LayerStatistics


def build_expert(
    backbone: dict[str, Tensor], values: dict[str, Any], experts: ExpertsConfig, directions: list[Tensor] | None
) -> Decoder:
    """A float32 model in which only the new FFN (and its router rows when anchored) require gradients.

    `backbone` and `values` are the tensors and config.json of the backbone; `directions`, one [D] per layer, are where
    the router rows start (anchored experts only).
    """
    family = names.family_of(values["model_type"])
    start: dict[str, Tensor] = {}
    for name, tensor in backbone.items():
        if names.is_dense_ffn(name):
            start[names.dense_to_expert(name, 1, family)] = tensor.clone()
    for layer, direction_D in enumerate(directions or []):
        start[names.gate(layer, family)] = direction_D[None].clone()
    model = load_expert(backbone, values, start, experts.anchored).float()
    model.requires_grad_(False)
    for block in model.blocks:
        learns = (
            [block.ffn.get_submodule("experts.1"), block.ffn.get_submodule("gate")] if experts.anchored else [block.ffn]
        )
        for module in learns:
            module.requires_grad_(True)
        if experts.init == "fresh":
            initialise(learns[0], model.config.layers)
    return model


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
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an expert is: its FFN under the names of `slot`, in the type of the backbone's, and its router rows [1, D].

    Rows stay float32; there are none when the expert is not anchored.
    """
    ffn: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    family = model.config.family
    for name, tensor in model.state_dict().items():
        position = names.expert_position(name)
        if names.is_gate(name):
            rows[name] = tensor.detach().cpu().contiguous()
        elif position and position[1] == 1:
            ffn[names.expert_ffn(position[0], slot, position[2], family)] = _stored(tensor, dtype)
        elif names.is_dense_ffn(name) and not anchored:
            ffn[names.dense_to_expert(name, slot, family)] = _stored(tensor, dtype)
    return ffn, rows


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().cpu().to(dtype).contiguous()
