"""The mixture that a joint baseline trains: experts that start as copies of the backbone's FFN (arXiv 2212.05055)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.safetensors import WEIGHTS_NAME
from modularforge.artifacts import Backbone
from modularforge.assembly.small_files import copy_text_files
from modularforge.model import names
from modularforge.model.backbone import INITIAL_STD, Decoder
from modularforge.model.folder import backbone_tensors, fill, save_tensors
from modularforge.model.hub_config import CONFIG_NAME, model_config_of, moe_config, write_json
from modularforge.model.moe import build_moe, moe_layers


def build_joint(
    backbone: dict[str, Tensor], values: dict[str, Any], experts: int, experts_per_token: int, freeze_shared: bool
) -> Decoder:
    """`experts` copies of the FFN per layer and random router rows drawn from torch's global generator.

    `backbone` and `values` are the tensors and config.json of the backbone; with `freeze_shared` only feed-forward
    blocks and routers require gradients.
    """
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    # Copies: these tensors become the parameters, and training must not reach the backbone's.
    tensors = {name: tensor.clone() for name, tensor in backbone.items() if names.is_shared(name)}
    for name, tensor in backbone.items():
        if names.is_dense_ffn(name):
            copies = {names.dense_to_expert(name, slot, model.family): tensor.clone() for slot in range(experts)}
            tensors.update(copies)
    for layer in range(model.layers):
        tensors[names.gate(layer, model.family)] = nn.init.normal_(torch.empty(experts, model.width), std=INITIAL_STD)
    with torch.device("meta"):
        decoder = build_moe(model, vocab_size, experts, experts_per_token)
    fill(decoder, tensors).float()
    if freeze_shared:
        decoder.requires_grad_(False)
        for mixture in moe_layers(decoder):
            mixture.requires_grad_(True)
    return decoder


def without_rows(model: Decoder) -> Decoder:
    """The mixture with rows of zeros that are not trained: something else routes."""
    for layer in moe_layers(model):
        for row in layer.gate.parameters():
            row.data.zero_()
            row.requires_grad_(False)
    return model


def save_mixture(model: Decoder, backbone: Backbone, folder: Path) -> None:
    """Write a mixture with the backbone's tokenizer: weights in the type of the backbone's, router rows in float32."""
    dtype, layer = backbone.tensors[names.EMBEDDING].dtype, moe_layers(model)[0]
    tensors = {name: t if names.is_gate(name) else t.to(dtype) for name, t in backbone_tensors(model).items()}
    save_tensors(tensors, folder / WEIGHTS_NAME)
    shape = model.config, model.vocab_size, len(layer.experts), layer.experts_per_token
    write_json(folder / CONFIG_NAME, moe_config(*shape, backbone.values))
    copy_text_files(backbone.artifact, folder)
