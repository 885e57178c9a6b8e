"""Frozen speech encoders, layer by layer: Whisper's, in plain modules with Hugging Face's names.

Windows are as long as the audio: positions are cut, so that a word costs a word's time, and the frames of a padded
batch beyond an utterance's end are masked everywhere, so that a batch computes what single utterances do.
"""

# B batch  F feature frames  M bins  T frames behind the convolutions  D width  N heads  H head width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modularforge.errors import DataError


class Encoder(Protocol):
    """What the speech model asks of an encoder; a module with frozen parameters."""

    width: int
    num_layers: int

    def embed(self, features_BFM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's input [B, T, D] and the frames of each utterance there."""

    def layer(self, index: int, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """One frozen layer."""

    def finish(self, x_BTD: Tensor) -> Tensor:
        """The final norm, where there is one."""


@dataclass(frozen=True)
class WhisperShape:
    """Sizes of a Whisper encoder."""

    bins: int = 80
    width: int = 384
    layers: int = 4
    heads: int = 6
    ffn_width: int = 1536
    positions: int = 1500


def frame_mask(lengths_B: Tensor, frames: int) -> Tensor:
    """Which of the frames of a padded batch are there, [B, T]."""
    return torch.arange(frames, device=lengths_B.device)[None] < lengths_B[:, None]


class WhisperEncoder(nn.Module):
    """Whisper's encoder (arXiv 2212.04356); two frames of 10 ms become one of 20 ms."""

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.shape, self.width, self.num_layers = shape, shape.width, shape.layers
        self.conv1 = nn.Conv1d(shape.bins, shape.width, 3, padding=1)
        self.conv2 = nn.Conv1d(shape.width, shape.width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(shape.positions, shape.width)
        self.layers = nn.ModuleList(WhisperLayer(shape) for _ in range(shape.layers))
        self.layer_norm = nn.LayerNorm(shape.width)

    def embed(self, features_BFM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Convolutions and positions; raises DataError for more frames than there are positions."""
        length_B = (frames_B + 1) // 2
        if (longest := int(length_B.max())) > self.shape.positions:
            raise DataError(
                f"audio must be at most {self.shape.positions / 50:g} seconds for this encoder, but has "
                f"{longest / 50:g}; lower speech.data.max_seconds"
            )
        mask_B1F = frame_mask(frames_B, features_BFM.shape[1])[:, None]
        x_BDF = F.gelu(self.conv1(features_BFM.transpose(1, 2) * mask_B1F))
        x_BTD = F.gelu(self.conv2(x_BDF * mask_B1F)).transpose(1, 2)
        return x_BTD + self.embed_positions.weight[: x_BTD.shape[1]], length_B

    def layer(self, index: int, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """One layer."""
        output_BTD: Tensor = self.layers[index](x_BTD, mask_BT)
        return output_BTD

    def finish(self, x_BTD: Tensor) -> Tensor:
        """The final norm."""
        output_BTD: Tensor = self.layer_norm(x_BTD)
        return output_BTD


class WhisperLayer(nn.Module):
    """Pre-norm attention over all frames that are there, and a GELU block."""

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(shape)
        self.self_attn_layer_norm = nn.LayerNorm(shape.width)
        self.fc1 = nn.Linear(shape.width, shape.ffn_width)
        self.fc2 = nn.Linear(shape.ffn_width, shape.width)
        self.final_layer_norm = nn.LayerNorm(shape.width)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Residual stream in, residual stream out."""
        x_BTD = x_BTD + self.self_attn(self.self_attn_layer_norm(x_BTD), mask_BT)
        output_BTD: Tensor = x_BTD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BTD))))
        return output_BTD


class WhisperAttention(nn.Module):
    """Attention without causality; keys have no bias."""

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Mix the frames that are there."""
        query, key, value = (
            projection(x_BTD).view(*x_BTD.shape[:2], self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed_BNTH = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BT[:, None, None])
        output_BTD: Tensor = self.out_proj(mixed_BNTH.transpose(1, 2).flatten(-2))
        return output_BTD


def whisper_shape(values: Mapping[str, Any], origin: str) -> WhisperShape:
    """The shape in a config.json; raises DataError, which `origin` names, when it is not Whisper's."""
    if values.get("model_type") != "whisper":
        raise DataError(
            f"{origin} must be a Whisper model, but its config.json says model_type {values.get('model_type')!r:.60}; "
            "name a folder with a Whisper model for speech.model.encoder"
        )
    names = {
        "bins": "num_mel_bins",
        "width": "d_model",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "ffn_width": "encoder_ffn_dim",
        "positions": "max_source_positions",
    }
    try:
        return WhisperShape(**{own: int(values[name]) for own, name in names.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{origin} must have the sizes of its encoder in config.json, but lacks {error}") from error


PREFIXES = ("model.encoder.", "encoder.")


def whisper_tensors(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Those of the encoder in a Whisper model's weights, by their names in the encoder; raises DataError for none."""
    for prefix in PREFIXES:
        if found := {name.removeprefix(prefix): item for name, item in tensors.items() if name.startswith(prefix)}:
            return found
    raise DataError(f"{origin} must hold weights of a Whisper encoder, but holds none; name another folder")
