"""Models as Hugging Face folders: read any model of ours, at once or expert by expert, write backbones.

Read on demand, an assembled model's experts are read when the first token visits them, and never if none does; tensors
then come from a function, so files may be mapped, fetched and checked behind it. The assembled model's weights are not
written here but streamed by the assembler, without torch.
"""

# N tokens  D width

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.safetensors import weight_files
from checkpoints.tensors import weight_file_chunks
from modularforge.errors import DataError, MismatchError
from modularforge.model import names
from modularforge.model.adapter_config import ADAPTERS_NAME
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.hub_config import OWN_ROWS_NAME, TABLES_NAME, experts_of, is_moe, model_config_of, read_config
from modularforge.model.lora_mixture import Even, load_adapters
from modularforge.model.meta import without_weights
from modularforge.model.moe import build_moe, moe_layers
from modularforge.model.own_rows import load_own_rows
from modularforge.model.shards import host_tensors
from modularforge.model.text_router import load_text_router

Weight = Any
"""A tensor on the host, or a `LaterTensor`: one that is made whole from all ranks' pieces when it is written."""


OWN_ROWS = "own_rows."
"""Before the names of experts' own rows in a state dict."""


def backbone_tensors(decoder: Decoder) -> dict[str, Weight]:
    """All weights by Hugging Face's names, a tied head only once; without rows that experts have for themselves."""
    tensors = host_tensors({name: t for name, t in decoder.state_dict().items() if not name.startswith(OWN_ROWS)})
    if decoder.config.tied_head:
        tensors.pop(names.HEAD)
    return tensors


def learned_rows(decoder: Decoder) -> dict[str, Weight]:
    """Rows that experts have for themselves and that were trained here, by their names in a model's folder."""
    assert decoder.own_rows is not None
    renamed = {OWN_ROWS + name: other for name, other in decoder.own_rows.names_in_file().items()}
    tensors = host_tensors({name: t for name, t in decoder.state_dict().items() if name in renamed})
    return {renamed[name]: tensor for name, tensor in tensors.items()}


def save_tensors(tensors: Mapping[str, Weight], path: Path) -> None:
    """Write one weight file, tensor by tensor; the metadata entry is what transformers expects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.writelines(weight_file_chunks(tensors, {"format": "pt"}))


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
    with without_weights():
        if is_moe(values):
            decoder = build_moe(model, vocab_size, experts_of(values), values["num_experts_per_tok"])
        else:
            decoder = build_backbone(model, vocab_size)
    decoder = fill(decoder, read_tensors(folder))
    if (folder / ADAPTERS_NAME).is_file():
        decoder = load_adapters(decoder, folder)
    return with_own_rows(with_text_router(decoder, folder / TABLES_NAME), folder / OWN_ROWS_NAME)


def with_own_rows(decoder: Decoder, path: Path) -> Decoder:
    """The decoder with the rows that its experts have for themselves, where there are such; raises MismatchError."""
    if not path.is_file():
        return decoder
    if decoder.text_router is None:
        raise MismatchError(
            f"{path} must lie beside the tables of a text router, by which tokens choose among the experts' own rows, "
            f"but there is no {TABLES_NAME}; copy the whole folder, or assemble the model again"
        )
    slots = decoder.text_router.slots
    experts, tied = slots - int(decoder.text_router.has_public), decoder.config.tied_head
    decoder.own_rows = load_own_rows(path, experts, decoder.vocab_size, tied)
    return decoder


def with_text_router(decoder: Decoder, path: Path) -> Decoder:
    """The decoder, routed by the tables at `path` where it has experts and there are such; raises MismatchError."""
    layers = moe_layers(decoder)
    if not layers or not path.is_file():
        if layers and isinstance(layers[0].gate, Even) and layers[0].experts_per_token < len(layers[0].experts):
            raise DataError(
                f"{path} must say how texts choose among the adapters, but is missing; copy the whole folder, or "
                "assemble the model again"
            )
        return decoder
    router, slots = load_text_router(path), len(layers[0].experts)
    if router.slots != slots:
        raise MismatchError(
            f"{path} must be the tables of a model with {slots} experts, but has {router.slots}; assemble the model "
            "again, or delete it to route by the model's own rows"
        )
    decoder.text_router = router
    router.holds = decoder.holds_choice
    return decoder


def load_pretrained(folder: Path) -> Decoder:
    """A pretrained dense model in a folder, mapped from its files in the types that they have."""
    values = read_config(folder)
    model, vocab_size = model_config_of(values), int(values["vocab_size"])
    with without_weights():
        decoder = build_backbone(model, vocab_size)
    tensors = read_tensors(folder)
    return fill(decoder, {n: t for n, t in tensors.items() if not names.is_redundant(n, model.tied_head)})


def cast_like(tensors: Mapping[str, Weight], types: Mapping[str, torch.dtype]) -> dict[str, Weight]:
    """The tensors in the types that `types` names; what was trained in float32 is stored as it was before."""
    return {name: tensor.to(types[name]).contiguous() for name, tensor in tensors.items()}


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


TensorSource = Callable[[str], Tensor]


class ExpertOnDemand(nn.Module):
    """Stands for an expert until it is visited; `empty` is that expert without weights (on the meta device)."""

    def __init__(self, empty: nn.Module, prefix: str, source: TensorSource) -> None:
        super().__init__()
        # In a tuple, nn.Module does not see it: moving or counting weights leaves out what was never visited.
        self._waiting: tuple[nn.Module, str, TensorSource] | None = (empty, prefix, source)
        self.expert: nn.Module | None = None

    def forward(self, x_ND: Tensor) -> Tensor:
        """The expert's output, on the device that its input is on."""
        if self._waiting is not None:
            self.expert = _with_weights(*self._waiting).to(x_ND.device)
            self._waiting = None
        assert self.expert is not None
        output_ND: Tensor = self.expert(x_ND)
        return output_ND


def load_on_demand(values: Mapping[str, Any], present: Collection[str], source: TensorSource) -> Decoder:
    """The assembled model of a config.json; `present` are the names of the tensors that `source` can give.

    Raises MismatchError when names are missing or left over; shapes of experts are checked when they are read.
    """
    config, vocab_size = model_config_of(values), int(values["vocab_size"])
    with without_weights():
        decoder = build_moe(config, vocab_size, experts_of(values), values["num_experts_per_tok"])
    wanted = {name for name, _ in decoder.named_parameters()}
    if wrong := sorted(wanted ^ set(present)):
        state = "is missing" if wrong[0] in wanted else "is left over"
        raise MismatchError(
            f"weights must have the tensors that config.json says, but {wrong[0]} {state} ({len(wrong)} tensors "
            "differ); use files of one model"
        )
    for index, layer in enumerate(moe_layers(decoder)):
        block = f"model.layers.{index}.{names.MOE_BLOCK[config.family]}.experts."
        layer.experts = nn.ModuleList(
            ExpertOnDemand(expert, f"{block}{slot}.", source) for slot, expert in enumerate(layer.experts)
        )
    return fill(decoder, {name: source(name) for name, _ in decoder.named_parameters()})


def _with_weights(expert: nn.Module, prefix: str, source: TensorSource) -> nn.Module:
    tensors = {name: source(prefix + name) for name, _ in expert.named_parameters()}
    for name, weight in expert.named_parameters():
        if tensors[name].shape != weight.shape:
            raise MismatchError(
                f"{prefix}{name} must have shape {tuple(weight.shape)}, but in the weights it has "
                f"{tuple(tensors[name].shape)}; use files of one model"
            )
    expert.load_state_dict(tensors, assign=True)
    return expert.requires_grad_(False)
