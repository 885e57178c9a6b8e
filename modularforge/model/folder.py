"""Models as Hugging Face folders: read any model of ours, write backbones and experts.

The assembled model's weights are not written here but streamed by the assembler, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.safetensors import weight_files
from modularforge.errors import DataError, MismatchError
from modularforge.model import names
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.hub_config import TABLES_NAME, experts_of, is_moe, model_config_of, read_config
from modularforge.model.moe import build_anchored_pair, build_moe, moe_layers
from modularforge.model.text_router import load_text_router


def backbone_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """All weights by Hugging Face's names, a tied head only once."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    if decoder.config.tied_head:
        tensors.pop(names.HEAD)
    return tensors


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one weight file; the metadata entry is what transformers expects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, mapped from its file or files."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors.update(load_file(path))
        except Exception as error:  # safetensors raises its own class for a damaged header or a truncated buffer
            raise DataError(f"{path} must be a whole weight file, but is not ({error}); make it again") from error
    return tensors


def load_model(folder: Path) -> Decoder:
    """The backbone or assembled model in a folder, ready for evaluation."""
    values = read_config(folder)
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    with torch.device("meta"):
        if is_moe(values):
            decoder = build_moe(model, vocab_size, experts_of(values), values["num_experts_per_tok"])
        else:
            decoder = build_backbone(model, vocab_size)
    return with_text_router(fill(decoder, read_tensors(folder)), folder / TABLES_NAME)


def with_text_router(decoder: Decoder, path: Path) -> Decoder:
    """The decoder, routed by the tables at `path` where it has experts and there are such; raises MismatchError."""
    layers = moe_layers(decoder)
    if not layers or not path.is_file():
        return decoder
    router, slots = load_text_router(path), len(layers[0].experts)
    if router.slots != slots:
        raise MismatchError(
            f"{path} must be the tables of a model with {slots} experts, but has {router.slots}; assemble the model "
            "again, or delete it to route by the model's own rows"
        )
    decoder.text_router = router
    return decoder


def load_pretrained(folder: Path) -> Decoder:
    """A pretrained dense model in a folder, in float32 for training."""
    values = read_config(folder)
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    with torch.device("meta"):
        decoder = build_backbone(model, vocab_size)
    tensors = read_tensors(folder)
    return fill(decoder, {n: t for n, t in tensors.items() if not names.is_redundant(n, model.tied_head)}).float()


def cast_like(tensors: dict[str, Tensor], types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors in the types that `types` names; what was trained in float32 is stored as it was before."""
    return {name: tensor.to(types[name]).contiguous() for name, tensor in tensors.items()}


def load_expert(
    backbone: dict[str, Tensor], values: dict[str, Any], expert: dict[str, Tensor], anchored: bool
) -> Decoder:
    """An expert's own model: the pair of public FFN and expert when anchored, else the backbone with its FFN.

    `backbone` and `values` are the tensors and config.json of the backbone, `expert` the tensors the job wrote.
    """
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    with torch.device("meta"):
        decoder = build_anchored_pair(model, vocab_size) if anchored else build_backbone(model, vocab_size)
    return fill(decoder, own_tensors(backbone, expert, anchored, model.family))


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


def fill(decoder: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """Give a decoder built on the meta device its weights; raises MismatchError naming what does not fit."""
    expected = {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise MismatchError(
            f"{name} must have shape {expected.get(name, 'none, as the model has no such tensor')}, but in the weights "
            f"it has {found.get(name, 'none: it is missing')} ({len(wrong)} tensors differ); use files of one model"
        )
    decoder.load_state_dict(tensors, strict=False, assign=True)
    if decoder.config.tied_head:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    decoder.restore_positions()
    return decoder
