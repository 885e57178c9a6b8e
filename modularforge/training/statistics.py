"""Gather router statistics: run a model over text and sum what its routers see, per layer."""

# N tokens  D width

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modularforge.assembly.routing import LayerStatistics
from modularforge.model.backbone import Decoder


def gather_statistics(model: Decoder, batches: Iterable[Tensor], device: torch.device) -> list[LayerStatistics]:
    """Token count, sum of x and sum of x xT of the feed-forward inputs of every layer, over batches of ids [B, T]."""
    width = model.config.width
    sums = [torch.zeros(width, dtype=torch.float64) for _ in model.blocks]
    outers = [torch.zeros(width, width, dtype=torch.float64) for _ in model.blocks]
    count = 0

    def observer(layer: int) -> Any:
        def observe(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x_ND = arguments[0].reshape(-1, width).float()
            sums[layer] += x_ND.sum(dim=0).double().cpu()
            outers[layer] += (x_ND.T @ x_ND).double().cpu()

        return observe

    handles = [block.ffn.register_forward_pre_hook(observer(layer)) for layer, block in enumerate(model.blocks)]
    model.to(device).eval()
    with torch.inference_mode():
        for tokens_BT in batches:
            model(tokens_BT.to(device))
            count += tokens_BT.numel()
    for handle in handles:
        handle.remove()
    as_numpy = [(np.asarray(s), np.asarray(o)) for s, o in zip(sums, outers, strict=True)]
    return [LayerStatistics(float(count), sum_D, outer_DD) for sum_D, outer_DD in as_numpy]
