"""Larger models that start from a dense backbone: mixtures of copies of its FFN, and a wider one."""

# D width  F FFN width  C copies

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.model import names
from modularforge.model.backbone import INITIAL_STD, build_backbone
from modularforge.model.deferred import Deferred, read
from modularforge.model.folder import OWN_ROWS
from modularforge.model.hub_config import model_config_of
from modularforge.model.meta import without_weights
from modularforge.model.moe import build_moe, moe_layers
from modularforge.model.own_rows import OwnRows

# Of the noise, relative to the rms of the matrix that it is added to. On the quickstart (validation, seed 0, rate 2e-3)
# shares of 0, 0.1, 0.5, 1 and 2 train to 3.4787, 3.4783, 3.4712, 3.4606 and 3.4522; dense to 3.4799.
NOISE = 2.0


def joint_mixture(
    backbone: dict[str, Tensor], values: dict[str, Any], experts: int, experts_per_token: int, freeze_shared: bool
) -> Deferred:
    """`experts` copies of the FFN per layer (sparse upcycling, arXiv 2212.05055), and random router rows, in float32.

    The rows are drawn here from torch's global generator; copies are made where the weights are, one after another.
    `backbone` and `values` are the tensors and config.json of the backbone; with `freeze_shared` only feed-forward
    blocks and routers require gradients.
    """
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    tensors = {name: tensor for name, tensor in backbone.items() if names.is_shared(name)}
    for name, tensor in backbone.items():
        if names.is_dense_ffn(name):
            tensors |= {names.dense_to_expert(name, slot, model.family): tensor for slot in range(experts)}
    for layer in range(model.layers):
        tensors[names.gate(layer, model.family)] = nn.init.normal_(torch.empty(experts, model.width), std=INITIAL_STD)
    with without_weights():
        decoder = build_moe(model, vocab_size, experts, experts_per_token)
    if freeze_shared:
        decoder.requires_grad_(False)
        for mixture in moe_layers(decoder):
            mixture.requires_grad_(True)
    return read(decoder, tensors, torch.float32)


def without_rows(mixture: Deferred) -> Deferred:
    """The mixture with rows of zeros that are not trained: something else routes."""
    weights = dict(mixture.weights)
    for name, row in mixture.model.named_parameters():
        if names.is_gate(name):
            row.requires_grad_(False)
            weights[name] = partial(torch.zeros, row.shape)
    return replace(mixture, weights=weights)


def with_own_rows(mixture: Deferred, experts: int, parts: Collection[str]) -> Deferred:
    """The mixture whose experts have these of `embeddings` and `head` for themselves: copies that learn with it.

    A head that is tied to the embeddings is tied to each expert's own.
    """
    model, weights, tied = mixture.model, dict(mixture.weights), mixture.model.config.tied_head
    heads = [torch.empty_like(model.lm_head.weight) for _ in range(experts)] if "head" in parts and not tied else None
    embeddings = [torch.empty_like(model.model.embed_tokens.weight) for _ in range(experts)]
    model.own_rows = OwnRows(embeddings, heads, tied, learns=True)
    for name, in_file in model.own_rows.names_in_file().items():
        weights[OWN_ROWS + name] = mixture.weights[in_file.partition(".")[2]]
    return Deferred(model, weights)


def widened(backbone: dict[str, Tensor], values: dict[str, Any], times: int) -> Deferred:
    """The backbone, in float32, with each SwiGLU unit `times` times, which computes what the backbone does.

    As in Net2WiderNet (Chen et al., arXiv 1511.05641, section 3.2), copies share a unit's outgoing weight, here in
    equal parts, and noise tells them apart. Unequal parts would not: AdamW's step does not depend on the size of a
    gradient. The noise is in the up projection alone and sums to zero over the copies of a unit: a SwiGLU unit is
    linear in it, so that the copies together stay the unit, to rounding. It is drawn from torch's global generator,
    where the weights are made.
    `backbone` and `values` are the tensors and config.json of the backbone.
    """
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    weights = {name: partial(_widened, name, tensor, times) for name, tensor in backbone.items()}
    wide = model.model_copy(update={"ffn_width": times * model.ffn_width})
    with without_weights():
        decoder = build_backbone(wide, vocab_size)
    return Deferred(decoder, weights)


def _widened(name: str, tensor: Tensor, times: int) -> Tensor:
    """A tensor of the wide model, in float32."""
    part = names.dense_part(name)
    if not part:
        return tensor.float()
    if part == "w2":
        return tensor.float().repeat(1, times) / times
    copies_CFD = tensor.float().repeat(times, 1).view(times, *tensor.shape)
    if part == "w3" and times > 1:
        noise_CFD = torch.randn_like(copies_CFD)
        noise_CFD -= noise_CFD.mean(dim=0)
        copies_CFD = copies_CFD + NOISE * float(tensor.float().square().mean().sqrt()) * noise_CFD
    return copies_CFD.reshape(-1, tensor.shape[1])
