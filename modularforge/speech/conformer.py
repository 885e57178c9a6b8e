"""A frozen conformer encoder: transformers' Wav2Vec2-BERT (w2v-BERT 2.0), layer by layer.

It reads Kaldi's filter banks, two frames of 10 ms side by side (arXiv 2312.05187, section 3.2.1). Frames beyond an
utterance's end are masked in attention and in the convolutions.
"""

# B batch  F feature frames  M bins  T pairs of frames  D width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modularforge.errors import DataError
from modularforge.speech.audio import require_package
from modularforge.speech.encoder import frame_mask

MODEL_TYPE = "wav2vec2-bert"
PAIR = 2
PREFIX = "wav2vec2_bert."


class ConformerEncoder(nn.Module):
    """The layers of a Wav2Vec2-BERT; its adapter, where it has one, is left out."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        package = require_package("transformers")
        self.config = package.Wav2Vec2BertConfig(**values)
        self.config._attn_implementation = "eager"
        self.model = package.Wav2Vec2BertModel(self.config)
        self.width, self.num_layers = int(self.config.hidden_size), int(self.config.num_hidden_layers)

    def embed(self, features_BFM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of frames at the encoder's width, zero where there are none. Raises DataError for other bins."""
        batch, frames, bins = features_BFM.shape
        if PAIR * bins != self.config.feature_projection_input_dim:
            raise DataError(
                f"speech.data.bins must be {self.config.feature_projection_input_dim // PAIR} for this encoder, but is "
                f"{bins}; change it"
            )
        length_B = (frames_B + 1) // PAIR
        kept_BFM = nn.functional.pad(features_BFM * frame_mask(frames_B, frames)[..., None], (0, 0, 0, frames % PAIR))
        x_BTD, _ = self.model.feature_projection(kept_BFM.reshape(batch, -1, PAIR * bins))
        return x_BTD * frame_mask(length_B, x_BTD.shape[1])[..., None], length_B

    def layer(self, index: int, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """One conformer block."""
        encoder = self.model.encoder
        positions = encoder.embed_positions(x_BTD) if encoder.embed_positions is not None else None
        hidden = torch.zeros_like(mask_BT, dtype=x_BTD.dtype).masked_fill(~mask_BT, torch.finfo(x_BTD.dtype).min)
        found = encoder.layers[index](
            x_BTD,
            attention_mask=hidden[:, None, None].expand(-1, 1, x_BTD.shape[1], -1),
            relative_position_embeddings=positions,
            conv_attention_mask=mask_BT,
        )
        output_BTD: Tensor = found[0] if isinstance(found, tuple) else found
        return output_BTD

    def finish(self, x_BTD: Tensor) -> Tensor:
        """Blocks end with a norm of their own."""
        return x_BTD


def conformer_tensors(tensors: Mapping[str, Tensor], encoder: nn.Module, origin: str) -> dict[str, Tensor]:
    """Those that the encoder has, by its names; raises DataError when some of its are missing."""
    own = encoder.state_dict()
    found = {f"model.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
    if missing := sorted(name for name in own if name not in found and "masked_spec_embed" not in name):
        raise DataError(f"{origin} must hold the weights of its encoder, but lacks {missing[0]}; name another folder")
    return {name: tensor for name, tensor in found.items() if name in own}
