"""Rows of embeddings and head that each expert of an assembled model has for itself (`assembly.shared: own`).

A token's embedding is the mean of what its experts make of it, by the router's weights, and so are the logits of the
next token; the backbone's own rows stand for the public expert. Only a model whose experts are chosen by the ids alone,
by a text router, can do that: the choice is known before the first layer. The rows lie beside a model's weights, in a
file that other programs do not read.
"""

# B batch  T tokens  N tokens  D width of the rows  V vocabulary  E experts  S slots (E, and the public one before them)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modularforge.errors import DataError, MismatchError
from modularforge.model import names
from modularforge.model.head import IGNORED, Reduction
from modularforge.model.sizes import LOGITS_AT_ONCE


class OwnRows(nn.Module):
    """Embeddings and head of each expert: buffers, which are no part of a state dict, or parameters, where they learn.

    Without heads of their own experts read by the backbone's, or, with `is_tied`, by their embeddings. The weights of a
    batch's tokens come with their embeddings, and are kept for the head.
    """

    def __init__(
        self, embeddings_EVD: Sequence[Tensor], heads_EVD: Sequence[Tensor] | None, is_tied: bool, learns: bool = False
    ) -> None:
        super().__init__()
        self.experts, self.is_tied, self.has_heads = len(embeddings_EVD), is_tied, heads_EVD is not None
        for part, each in ((names.EMBEDDING, embeddings_EVD), (names.HEAD, heads_EVD or ())):
            for expert, rows_VD in enumerate(each):
                if learns:
                    self.register_parameter(_attribute(expert, part), nn.Parameter(rows_VD))
                else:
                    self.register_buffer(_attribute(expert, part), rows_VD, persistent=False)
        self.weight_NS: Tensor | None = None

    def rows(self, expert: int, part: str) -> Tensor:
        """[V, D] of one expert: `names.EMBEDDING` or `names.HEAD`."""
        found: Tensor = getattr(self, _attribute(expert, part))
        return found

    def names_in_file(self) -> dict[str, str]:
        """By their names here, those of all rows in the file of a model's folder."""
        parts, experts = [names.EMBEDDING, *[names.HEAD] * self.has_heads], range(self.experts)
        return {_attribute(expert, part): names.own_row(expert, part) for expert in experts for part in parts}

    @property
    def matrix(self) -> int:
        """Values of one expert's embeddings: the vocabulary times the width."""
        return self.rows(0, names.EMBEDDING).numel()

    @property
    def parameters_each(self) -> int:
        """Values that one expert has."""
        return self.matrix * (1 + self.has_heads)

    def embedded(self, x_BTD: Tensor, tokens_BT: Tensor, weight_NS: Tensor) -> Tensor:
        """The embeddings [B, T, D] with what experts make of them; keeps the weights for the head."""
        self.weight_NS = weight_NS.to(x_BTD.dtype)
        x_ND, tokens_N, before = x_BTD.flatten(0, 1), tokens_BT.flatten(), weight_NS.shape[1] - self.experts
        backbone_ND = x_ND
        for expert in range(self.experts):
            rows_VD, share_N = self.rows(expert, names.EMBEDDING), self.weight_NS[:, before + expert]
            at = share_N.nonzero()[:, 0]
            width = rows_VD.shape[1]
            own = rows_VD[tokens_N[at]].to(x_ND.dtype) - backbone_ND[at, :width]
            x_ND = x_ND.index_add(0, at, F.pad(own * share_N[at, None], (0, x_ND.shape[1] - width)))
        return x_ND.view_as(x_BTD)

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits [B, T, V] of what the head reads, of all tokens or the last; `weight_VD` is the backbone's head."""
        assert self.weight_NS is not None
        B, T, _ = x_BTD.shape
        weight_NS = self.weight_NS.view(B, -1, self.weight_NS.shape[-1])[:, -T:].flatten(0, 1)
        return self._logits(x_BTD.flatten(0, 1), weight_VD, weight_NS).view(B, T, -1)

    def loss(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, reduction: Reduction) -> Tensor:
        """As `head_loss`, with logits of a few rows at a time."""
        assert self.weight_NS is not None
        x_ND, targets_N, weight_NS = x_BTD.flatten(0, 1), targets_BT.flatten(), self.weight_NS
        step = max(1, LOGITS_AT_ONCE["cpu" if x_ND.device.type == "cpu" else "cuda"] // len(weight_VD))

        def piece(x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            logits = self._logits(x, weight_VD, weights).float()
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

        found = []
        for start in range(0, len(x_ND), step):
            rows = x_ND[start : start + step], targets_N[start : start + step], weight_NS[start : start + step]
            found.append(checkpoint(piece, *rows, use_reentrant=False) if torch.is_grad_enabled() else piece(*rows))
        losses_N = torch.cat(found)
        if reduction == "none":
            return losses_N.view_as(targets_BT)
        return losses_N.sum() / ((targets_N != IGNORED).sum() if reduction == "mean" else 1)

    def _logits(self, x_ND: Tensor, weight_VD: Tensor, weight_NS: Tensor) -> Tensor:
        """The sum over slots of weight times logits, each of the tokens that visit the slot."""
        before, part = weight_NS.shape[1] - self.experts, names.EMBEDDING if self.is_tied else names.HEAD
        is_shared = not self.is_tied and not self.has_heads
        output_NV = x_ND.new_zeros(len(x_ND), len(weight_VD))
        for slot in range(weight_NS.shape[1]):
            rows_VD = weight_VD if slot < before or is_shared else self.rows(slot - before, part)
            at = weight_NS[:, slot].nonzero()[:, 0]
            # Channels of the evidence router, which come after an expert's own, never reach a head: their gain is zero.
            read = x_ND[at, : rows_VD.shape[1]] * weight_NS[at, slot, None]
            output_NV = output_NV.index_add(0, at, F.linear(read, rows_VD.to(read.dtype)).to(output_NV.dtype))
        return output_NV


def _attribute(expert: int, part: str) -> str:
    """Embeddings are known as such by the optimizer, which lets them not decay."""
    return f"{'embed_tokens' if part == names.EMBEDDING else 'lm_head'}_{expert}"


def load_own_rows(path: Path, experts: int, vocab_size: int, is_tied: bool) -> OwnRows:
    """The rows that `path` holds; raises DataError for another file, MismatchError for that of another model."""
    try:
        tensors = load_file(path)
    except Exception as error:  # of the disk, or safetensors' own class
        raise DataError(
            f"{path} must hold the experts' own rows, but does not ({error}); copy the whole folder, or assemble the "
            "model again"
        ) from error
    found = {
        part: [
            tensors[names.own_row(expert, part)] for expert in range(experts) if names.own_row(expert, part) in tensors
        ]
        for part in (names.EMBEDDING, names.HEAD)
    }
    fits = len(found[names.EMBEDDING]) == experts and len(found[names.HEAD]) in (0, experts)
    if not fits or len(tensors) != sum(map(len, found.values())) or any(len(t) != vocab_size for t in tensors.values()):
        raise MismatchError(
            f"{path} must have rows of {experts} experts for {vocab_size} tokens, but is of another model; copy the "
            "whole folder, or assemble the model again"
        )
    return OwnRows(found[names.EMBEDDING], found[names.HEAD] or None, is_tied)
