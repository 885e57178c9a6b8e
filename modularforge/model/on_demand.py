"""An assembled model whose experts are read when the first token visits them, and never if none does.

Everything else is read at once. Tensors come from a function, so files may be mapped, fetched and checked behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.errors import MismatchError
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.folder import fill
from modularforge.model.hub_config import experts_of, model_config_of
from modularforge.model.moe import build_moe, moe_layers

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
    with torch.device("meta"):
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
