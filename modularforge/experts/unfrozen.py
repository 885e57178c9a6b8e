"""Parts of the backbone that an expert's job trains beside its own (`experts.unfreeze`), for every kind that has them.

What a job made of them lies in a file of its own, for the mean that the assembled model gets; alone, an expert runs
with its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints import Artifact
from modularforge.assembly.shared import SHARED_NAME, shared_tensors
from modularforge.config import ExpertsConfig
from modularforge.experts.trainable import ParameterGroup
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.folder import cast_like, save_tensors
from modularforge.model.shards import host_tensors


def unfrozen(model: Decoder, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The shared weights that belong to these parts, by name, a tied head once."""
    return {name: weight for name, weight in model.named_parameters() if names.shared_part(name) in parts}


def unfreeze(model: Decoder, settings: ExpertsConfig) -> list[ParameterGroup]:
    """Let the parts that `experts.unfreeze` names learn, in float32 and at their own rate; no group without any."""
    shared = unfrozen(model, settings.unfreeze)
    for weight in shared.values():
        weight.data = weight.data.float().clone()  # training must not reach the backbone's tensors
        weight.requires_grad_(True)
    return [ParameterGroup(shared, settings.unfreeze_rate)] if shared else []


def save_unfrozen(model: Decoder, settings: ExpertsConfig, types: Mapping[str, torch.dtype], folder: Path) -> None:
    """Write what was made of these parts, in the types of the backbone's tensors; nothing where none were named."""
    if shared := unfrozen(model, settings.unfreeze):
        save_tensors(cast_like(host_tensors(shared), types), folder / SHARED_NAME)


def load_unfrozen(artifact: Artifact) -> dict[str, Tensor]:
    """What an expert has made of the weights that all share, where it trained any."""
    return load_file(artifact.local_file(SHARED_NAME)) if shared_tensors(artifact) else {}


def mean_unfrozen(backbone: Mapping[str, Tensor], experts: Sequence[Artifact]) -> dict[str, Tensor]:
    """Their mean over experts, in the types of the backbone's tensors; one that trained none counts with the backbone.

    Two experts' are in memory at a time.
    """
    total: dict[str, Tensor] = {}
    trained = sorted({name for expert in experts for name in shared_tensors(expert)})
    for expert in experts:
        own = load_unfrozen(expert)
        for name in trained:
            tensor = own.get(name, backbone[name])
            total[name] = total[name] + tensor if name in total else tensor.float()
    return {name: (tensor / len(experts)).to(backbone[name].dtype) for name, tensor in total.items()}
