"""The weight soup: one dense model whose feed-forward blocks are the mean of all experts' (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load_file
from torch import Tensor

from checkpoints import Artifact
from modularforge.artifacts import Backbone
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.folder import fill


def build_soup(backbone: Backbone, experts: Sequence[Artifact]) -> Decoder:
    """The backbone with the experts' mean FFN; two experts are in memory at a time."""
    total: dict[str, Tensor] = {}
    for expert in experts:
        for name, tensor in load_file(expert.local_file(EXPERT_NAME)).items():
            dense = names.expert_to_dense(name)
            total[dense] = total[dense] + tensor if dense in total else tensor.float()
    mean = {name: (tensor / len(experts)).to(backbone.tensors[name].dtype) for name, tensor in total.items()}
    return fill(backbone.model(), {**backbone.tensors, **mean})
