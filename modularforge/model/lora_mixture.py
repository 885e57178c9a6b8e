"""A decoder with several adapters, of which each token visits a few: the adapters form of an assembled model.

Its feed-forward blocks are a mixture's, whose experts share the backbone's matrices: slot 0 is the backbone alone where
that can be chosen, and the output is the weighted mean of the visited blocks', so that adapters of feed-forward blocks
do what the same experts do when they are folded into a mixture. Projections of attention add the weighted sum of what
the visited adapters add. All follow the same logits, which come from the text router; without one, all weigh alike.
"""

# B batch  T tokens  N tokens  D width  I inputs of a matrix  O its outputs  E slots  S ranks of all adapters together

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.tensors import LaterTensor
from modularforge.config import ATTENTION_MODULES, MLP_MODULES
from modularforge.errors import DataError
from modularforge.model import names
from modularforge.model.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADAPTERS_NAME,
    AdapterShape,
    Composite,
    parse_adapter_config,
    parse_composite,
)
from modularforge.model.backbone import Block, Decoder, FeedForward
from modularforge.model.lora import PARTS, LoraLinear, fitting_pairs, with_adapter
from modularforge.model.meta import without_weights
from modularforge.model.moe import SparseMoE
from modularforge.model.sizes import AdapterCounts

Pair = tuple[Tensor, Tensor]
_IN_SLOT = re.compile(r"(model\.layers\.\d+\.\w+)\.experts\.(\d+)\.(\w+)")


class Even(nn.Module):
    """A router that prefers nobody; where there is a text router, that one's logits outrank it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [N, E]."""
        return torch.zeros(len(x_ND), self.experts, device=x_ND.device)


class AdapterLayer(SparseMoE):
    """A mixture of one feed-forward block with several adapters, or of the plain block where they are elsewhere."""

    def __init__(self, experts: Sequence[nn.Module], experts_per_token: int) -> None:
        nn.Module.__init__(self)
        self.gate, self.experts = Even(len(experts)), nn.ModuleList(experts)
        self.experts_per_token = experts_per_token
        self.allowed: Sequence[int] | None = None
        self.observed_logits: Tensor | None = None
        self.observes = False
        self.given_NE: Tensor | None = None
        self.is_plain = all(expert is experts[0] for expert in experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """As a mixture does; equal experts are computed once, since their weights add up to one."""
        if not self.is_plain:
            return super().forward(x_BTD)
        if self.observes:
            self.observed_logits = self._logits(x_BTD)
        output_BTD: Tensor = self.experts[0](x_BTD)
        return output_BTD

    def weights(self, x_BTD: Tensor) -> Tensor:
        """The weight [B, T, E] of each slot for each token, zero for those that it does not visit."""
        weight_NA, expert_NA = self.choose(self._logits(x_BTD))
        weight_NE = torch.zeros(len(weight_NA), len(self.experts), device=weight_NA.device)
        return weight_NE.scatter(1, expert_NA, weight_NA).view(*x_BTD.shape[:-1], -1)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        if self.given_NE is not None:
            return self.given_NE
        logits_NE: Tensor = self.gate(x_BTD.reshape(-1, x_BTD.shape[-1]))
        return logits_NE


class MixedLinear(nn.Linear):
    """A matrix of attention, and the weighted sum of what the visited adapters add to it."""

    def __init__(
        self, matrix: nn.Linear, adapters: Mapping[int, tuple[AdapterShape, Pair]], layer: AdapterLayer
    ) -> None:
        with without_weights():
            super().__init__(matrix.in_features, matrix.out_features, bias=False)
            ranks = sum(shape.rank for shape, _ in adapters.values())
            self.lora_A = nn.Linear(matrix.in_features, ranks, bias=False)
            self.lora_B = nn.Linear(ranks, matrix.out_features, bias=False)
        self.weight, self._layer = matrix.weight, (layer,)  # in a tuple, nn.Module does not see it a second time
        self.lora_A.weight = nn.Parameter(torch.cat([a_RI.float() for _, (a_RI, _) in adapters.values()]))
        self.lora_B.weight = nn.Parameter(torch.cat([b_OR.float() for _, (_, b_OR) in adapters.values()], dim=1))
        slots = [slot for slot, (shape, _) in adapters.items() for _ in range(shape.rank)]
        scales = [shape.scale for shape, _ in adapters.values() for _ in range(shape.rank)]
        self.register_buffer("slot_S", torch.tensor(slots), persistent=False)
        self.register_buffer("scale_S", torch.tensor(scales), persistent=False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Outputs [B, T, O] in the matrix's own type."""
        output_BTO = F.linear(x_BTI, self.weight)
        weight_BTS = self._layer[0].weights(x_BTI)[..., self.get_buffer("slot_S")] * self.get_buffer("scale_S")
        added_BTO: Tensor = self.lora_B(self.lora_A(x_BTI.to(self.lora_A.weight.dtype)) * weight_BTS)
        return (output_BTO + added_BTO).to(output_BTO.dtype)


def load_adapters(decoder: Decoder, folder: Path) -> Decoder:
    """The backbone in a model folder with the adapters beside it; raises DataError or MismatchError."""
    composite = parse_composite((folder / ADAPTERS_NAME).read_bytes(), str(folder / ADAPTERS_NAME))
    adapters = [_read(folder / place) for place in composite.folders]
    if composite.choice is None:
        return with_adapter(decoder, *adapters[0], str(folder / composite.folders[0]))
    pairs = [
        fitting_pairs(decoder, shape, tensors, str(folder / place))
        for (shape, tensors), place in zip(adapters, composite.folders, strict=True)
    ]
    return mixed(decoder, [shape for shape, _ in adapters], pairs, composite)


def mixed(
    decoder: Decoder, shapes: Sequence[AdapterShape], pairs: Sequence[Mapping[str, Pair]], composite: Composite
) -> Decoder:
    """The decoder with all adapters in it; `pairs` are their A and B by the name of the matrix."""
    for index, block in enumerate(decoder.blocks):
        own = [{_part(name): pair for name, pair in each.items() if _layer(name) == index} for each in pairs]
        _mix(block, shapes, own, composite)
    sizes = tuple(sum(tensor.numel() for pair in each.values() for tensor in pair) for each in pairs)
    has_mlp = any(names.is_dense_ffn(name) for each in pairs for name in each)
    decoder.holds_choice = composite.choice == "sequence"
    decoder.adapters = AdapterCounts(sizes, min(composite.active, len(sizes)), composite.blocks_visited(has_mlp))
    return decoder.requires_grad_(False)


def adapters_apart(
    decoder: Decoder, trained: Mapping[str, Tensor | LaterTensor]
) -> list[dict[str, Tensor | LaterTensor]]:
    """Of trained parameters of a decoder with several adapters, each adapter's own by PEFT's names, in their order."""
    found: dict[int, dict[str, Tensor | LaterTensor]] = defaultdict(dict)
    for name, weight in trained.items():
        place, part = name.removesuffix(".weight").rsplit(".", 1)
        if part not in PARTS:
            continue
        if match := _IN_SLOT.fullmatch(place):
            found[int(match[2])][names.adapter(f"{match[1]}.{match[3]}.{part}.weight")] = weight
            continue
        slot_S = decoder.get_submodule(place).get_buffer("slot_S")
        slots = sorted(set(slot_S.tolist()))
        weight = _taken_once(weight, len(slots))
        for slot in slots:
            at_S = (slot_S == slot).nonzero()[:, 0].cpu()
            found[slot][names.adapter(name)] = _rows_of(weight, at_S) if part == "lora_A" else _columns_of(weight, at_S)
    return [found[slot] for slot in sorted(found)]


def _taken_once(weight: Tensor | LaterTensor, times: int) -> Tensor | LaterTensor:
    """The same, made the first time that it is taken and kept until it was taken so many times.

    A tensor in pieces is gathered from all ranks when it is made, and each adapter takes its own part of it. Kept are
    no more than the adapters of attention, on the host of the rank that writes.
    """
    if isinstance(weight, Tensor):
        return weight
    made: list[Tensor] = []
    left = times

    def take() -> Tensor:
        nonlocal left
        left -= 1
        if not made:
            made.append(weight.detach())
        return made[0] if left else made.pop()

    return LaterTensor(weight.shape, weight.dtype, take)


def _rows_of(weight: Tensor | LaterTensor, at_S: Tensor) -> LaterTensor:
    return LaterTensor((len(at_S), weight.shape[1]), weight.dtype, lambda: weight.detach()[at_S])


def _columns_of(weight: Tensor | LaterTensor, at_S: Tensor) -> LaterTensor:
    return LaterTensor((weight.shape[0], len(at_S)), weight.dtype, lambda: weight.detach()[:, at_S].contiguous())


def _mix(block: Block, shapes: Sequence[AdapterShape], own: Sequence[Mapping[str, Pair]], composite: Composite) -> None:
    """Put the adapters of one layer into its block; `own` are their A and B by the name of the projection."""
    plain, first = block.ffn, int(composite.public)
    assert isinstance(plain, FeedForward)
    experts = [_adapted(plain, shape, pairs) for shape, pairs in zip(shapes, own, strict=True)]
    layer = AdapterLayer([*([plain] * first), *experts], composite.active)
    block.add_module(block.ffn_name, layer)
    for part in ATTENTION_MODULES:
        there = {first + k: (shapes[k], pairs[part]) for k, pairs in enumerate(own) if part in pairs}
        if there:
            setattr(block.self_attn, part, MixedLinear(getattr(block.self_attn, part), there, layer))


def _adapted(plain: FeedForward, shape: AdapterShape, pairs: Mapping[str, Pair]) -> FeedForward:
    """The block with one adapter, sharing its matrices; the block itself where the adapter is elsewhere."""
    if not any(part in pairs for part in MLP_MODULES):
        return plain
    with without_weights():
        adapted = FeedForward(plain.gate_proj.in_features, plain.gate_proj.out_features)
    for part in MLP_MODULES:
        matrix: nn.Linear = getattr(plain, part)
        setattr(adapted, part, LoraLinear(matrix, shape, pairs[part]) if part in pairs else matrix)
    return adapted


def _read(folder: Path) -> tuple[AdapterShape, dict[str, Tensor]]:
    """Shape and tensors of the PEFT adapter in a folder; raises DataError."""
    try:
        shape = parse_adapter_config((folder / ADAPTER_CONFIG).read_bytes(), str(folder / ADAPTER_CONFIG))
        return shape, load_file(folder / ADAPTER_WEIGHTS)
    except DataError:
        raise
    except Exception as error:  # of the disk, or safetensors' own class
        raise DataError(
            f"{folder} must hold an adapter of PEFT ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}), but does not ({error}); "
            "bring it back, or assemble the model again"
        ) from error


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _part(name: str) -> str:
    return name.split(".")[-2]
