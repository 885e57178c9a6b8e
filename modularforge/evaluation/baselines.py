"""Baselines that are made of what other stages trained, in memory: the BTX merge and the weight soup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints import Artifact
from modularforge.config import TRAINED_ROUTERS, Config
from modularforge.errors import ConfigError
from modularforge.experts.kind import common_kind
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.deferred import Deferred, read
from modularforge.model.folder import fill, read_tensors
from modularforge.model.hub_config import model_config_of
from modularforge.model.meta import without_weights
from modularforge.model.moe import build_moe
from modularforge.routing.solvers import router_rows
from modularforge.stage_outputs import Backbone


def build_btx(config: Config, backbone: Backbone, branches: Sequence[Artifact]) -> Decoder:
    """The BTX merge (arXiv 2403.07816): the branches' FFNs become experts, and all else is their mean."""
    decoder, tensors = _merge(config, backbone, branches)
    return fill(decoder, tensors)


def merged_branches(config: Config, backbone: Backbone, branches: Sequence[Artifact]) -> Deferred:
    """The same in float32, to be trained: the branches' FFNs are read where the weights are."""
    decoder, tensors = _merge(config, backbone, branches)
    return read(decoder, tensors, torch.float32)


def _merge(config: Config, backbone: Backbone, branches: Sequence[Artifact]) -> tuple[Decoder, dict[str, Tensor]]:
    """The merged model on the meta device, and its tensors.

    The router is the one that `config.assembly` asks for, solved from the branches' statistics. Raises ConfigError for
    one that needs more than rows (evidence) or rows that branches do not train (learned).
    """
    if config.assembly.router in ("evidence", *TRAINED_ROUTERS):
        raise ConfigError(
            f"assembly.router must be one that is solved from sums for a BTX merge, but is {config.assembly.router}; "
            "use ridge or means"
        )
    model, kept = model_config_of(backbone.values), config.joint_experts > config.experts.count
    tensors: dict[str, Tensor] = {}
    if kept:
        dense = {name: tensor for name, tensor in backbone.tensors.items() if names.is_dense_ffn(name)}
        tensors.update({names.dense_to_expert(name, 0, model.family): tensor for name, tensor in dense.items()})
    for index, branch in enumerate(branches):
        for name, tensor in read_tensors(branch.local_folder()).items():
            if names.is_dense_ffn(name):
                tensors[names.dense_to_expert(name, index + int(kept), model.family)] = tensor
            else:
                share = tensor / len(branches)
                tensors[name] = tensors[name] + share if index else share
    rows = router_rows(config, list(branches), model)
    tensors.update({name: torch.from_numpy(row) for name, row in rows.items()})
    experts = len(branches) + int(kept)
    with without_weights():
        decoder = build_moe(model, int(backbone.values["vocab_size"]), experts, config.assembly.experts_per_token)
    return decoder, tensors


def solved_router(config: Config) -> Config:
    """The settings with a router that can be solved for branches, which train no rows, whatever the run's own is."""
    return config.model_copy(update={"assembly": config.assembly.model_copy(update={"router": "ridge"})})


def build_soup(config: Config, backbone: Backbone, experts: Sequence[Artifact]) -> Decoder:
    """The weight soup (arXiv 2203.05482): the mean of what the experts' kind trains."""
    return common_kind(config, experts).soup(backbone, experts)
