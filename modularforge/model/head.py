"""The loss of an output head without all of its logits at once, which take most of a step's memory where a vocabulary
is large: 12 bytes for each token and entry, several gigabytes.

Logits are made for a few rows at a time, and in training their gradients while they are there, so that nothing is
computed twice (Liger Kernel, arXiv 2410.10989). torch 2.13 has a `linear_cross_entropy` that does the same; it is
younger than the torch this project needs, and breaks compiled graphs. Small products take the plain way, whose bits are
as ever.
"""

# B batch  T tokens  N targets  D width  V vocabulary

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modularforge.model.sizes import LOGITS_AT_ONCE, MOST_LOGITS

IGNORED = -100  # as torch's cross_entropy has it

Reduction = Literal["mean", "sum", "none"]


def head_loss(x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy in nats, in float32, of the next token under logits x · weight; targets of -100 count for nothing.

    The mean over targets, their sum, or each of them [B, T] (without gradients where there are many).
    """
    if targets_BT.numel() * len(weight_VD) <= MOST_LOGITS:
        return _plain(F.linear(x_BTD, weight_VD), targets_BT, reduction)
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    if reduction == "none":
        spans = _spans(len(x_ND), weight_VD)
        losses = [_plain(F.linear(x_ND[None, rows], weight_VD), targets_N[None, rows], "none")[0] for rows in spans]
        return torch.cat(losses).view_as(targets_BT)
    total: Tensor = _SummedLoss.apply(x_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return total / (targets_N != IGNORED).sum() if reduction == "mean" else total


def _plain(logits_BTV: Tensor, targets_BT: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return F.cross_entropy(
            logits_BTV.float().transpose(1, 2), targets_BT, ignore_index=IGNORED, reduction=reduction
        )
    logits_NV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction=reduction)


def _spans(length: int, weight_VD: Tensor) -> list[slice]:
    """Rows whose logits are made at once."""
    most = LOGITS_AT_ONCE["cpu" if weight_VD.device.type == "cpu" else "cuda"]
    step = max(1, most // len(weight_VD))
    return [slice(start, start + step) for start in range(0, length, step)]


class _SummedLoss(torch.autograd.Function):
    """The sum over targets; the gradients of a sum of 1 are made on the way, and only scaled behind."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        wants_x, wants_weight, _ = ctx.needs_input_grad
        with torch.autocast(device, enabled=False):
            total, *gradients = _summed(x_ND, weight_VD, targets_N, dtype, wants_x, wants_weight)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_VD = (None if item is None else item * upstream[0].to(item.dtype) for item in ctx.saved_tensors)
        return x_ND, weight_VD, None


def _summed(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and its gradients by x and by the weight; products are of `dtype`, sums of float32."""
    weight, total = weight_VD.to(dtype), torch.zeros((), device=x_ND.device)
    of_x = torch.empty_like(x_ND) if wants_x else None
    of_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
    for rows in _spans(len(x_ND), weight_VD):
        targets, kept = targets_N[rows, None].clamp_min(0), targets_N[rows, None] != IGNORED
        x = x_ND[rows].to(dtype)
        log_probability = F.log_softmax(F.linear(x, weight).float(), dim=-1)
        total = total - (log_probability.gather(1, targets) * kept).sum()
        if wants_x or wants_weight:
            of_logits = log_probability.exp_()
            of_logits = of_logits.scatter_add_(1, targets, of_logits.new_full(targets.shape, -1.0)).to(dtype)
        if of_x is not None:
            of_x[rows] = (of_logits @ weight) * kept
        if of_weight is not None:
            _add_product(of_weight, of_logits, x * kept)
    return total, of_x, None if of_weight is None else of_weight.to(weight_VD.dtype)


def _add_product(of_weight: Tensor, of_logits: Tensor, x: Tensor) -> None:
    if x.dtype == of_weight.dtype:
        of_weight.addmm_(of_logits.T, x)
    else:
        of_weight += of_logits.T @ x
