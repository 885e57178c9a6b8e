"""Gather router statistics: run a model over text and sum what its routers see, per layer."""

# B batch  T tokens  N tokens  D width  V vocabulary

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modularforge.model.backbone import Block, Decoder
from modularforge.routing.statistics import LayerStatistics, RouterStatistics


def gather_statistics(
    model: Decoder, batches: Iterable[Tensor | tuple[Tensor, Tensor]], device: torch.device, moments: bool = True
) -> RouterStatistics:
    """Sums over batches of ids [B, T]: see `RouterStatistics`; outer products only where `moments` are wanted.

    Beside ids may come the number of each token's example [B, T]; those of negative number are padding, not counted.
    """
    model.to(device).eval()
    layers = [_LayerSums(block, moments) for block in model.blocks]
    counts_V = torch.zeros(model.vocab_size, dtype=torch.float64)
    with torch.no_grad():  # not inference_mode, whose tensors a sharded model could not take back into training
        for batch in batches:
            tokens_BT, examples_BT = batch if isinstance(batch, tuple) else (batch, None)
            counted_N = None if examples_BT is None else (examples_BT >= 0).flatten()
            for layer in layers:
                layer.counted_N = None if counted_N is None else counted_N.to(device)
            examples_BT = None if examples_BT is None else examples_BT.to(device)
            model(tokens_BT.to(device), examples_BT=examples_BT, headless=True)
            tokens_N = tokens_BT.flatten() if counted_N is None else tokens_BT.flatten()[counted_N]
            counts_V += torch.bincount(tokens_N.cpu(), minlength=model.vocab_size)
    inverse_rms_L: Any = np.asarray([float(layer.inverse_rms) / max(layer.count, 1) for layer in layers])
    tokens_V: Any = np.asarray(counts_V)
    return RouterStatistics([layer.finish() for layer in layers], tokens_V, inverse_rms_L)


class _LayerSums:
    """Adds up what passes one block's router while the model runs."""

    def __init__(self, block: Block, moments: bool) -> None:
        self.norm = block.post_attention_layernorm
        width = len(self.norm.weight)
        self.count = 0
        self.counted_N: Tensor | None = None  # tokens of the batch that count, or all
        # Where the model is, so that a GPU is asked for them once, at the end.
        double: dict[str, Any] = {"dtype": torch.float64, "device": self.norm.weight.device}
        self.sum_D, self.inverse_rms = torch.zeros(width, **double), torch.zeros((), **double)
        self.outer_DD = torch.zeros(width, width, **double) if moments else torch.zeros(0, 0)
        self.hook = self.norm.register_forward_hook(self._add)

    def _add(self, _module: nn.Module, arguments: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        stream_ND, x_ND = (x_BTD.reshape(-1, len(self.sum_D)).float() for x_BTD in (arguments[0], output_BTD))
        if self.counted_N is not None:
            stream_ND, x_ND = stream_ND[self.counted_N], x_ND[self.counted_N]
        self.count += len(x_ND)
        self.sum_D += x_ND.sum(dim=0).double()
        if len(self.outer_DD):
            with torch.autocast(x_ND.device.type, enabled=False):  # bf16 would round the sums
                self.outer_DD += (x_ND.T @ x_ND).double()
        self.inverse_rms += (stream_ND.square().mean(dim=1) + self.norm.epsilon).rsqrt().double().sum()

    def finish(self) -> LayerStatistics:
        """The sums; stops counting."""
        self.hook.remove()
        sum_D: Any = np.asarray(self.sum_D.cpu())
        outer_DD: Any = np.asarray(self.outer_DD.cpu())
        return LayerStatistics(float(self.count), sum_D, outer_DD)
