"""The speech model: frozen encoder, steering, projector, frozen language model; only the answer has a loss.

Utterances of a batch are joined without gaps as [audio; prompt; answer] and padded behind, which a causal language
model does not see: a padded batch computes what single utterances do.
"""

# B batch  F feature frames  M bins  T frames  S positions  P prompt ids  A answer ids  W width of the language model
# N targets that count  V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modularforge.errors import ConfigError
from modularforge.model.backbone import Decoder, KeyValueCache, rotary_angles
from modularforge.speech.encoder import Encoder, frame_mask
from modularforge.speech.low_rank import LowRank
from modularforge.speech.projector import Pooling, Projector, pool, pooled_lengths
from modularforge.speech.steering import ExpertWeights, Steering, SteeringShape

NO_TOKEN = -1
Variant = Literal["layerwise", "aligner", "hybrid", "static", "prompt", "lora"]
Tensors = Mapping[str, Tensor]
STEERED_AT: Mapping[Variant, str] = {
    "layerwise": "layers",
    "prompt": "layers",
    "aligner": "output",
    "hybrid": "output",
    "lora": "inputs",
}
"""Where experts act: behind every layer of the encoder, its final norm, or within layers, by what these read."""


@dataclass(frozen=True)
class SpeechShape:
    """How the parts of a speech model are put together; what `variant` means is said in docs/speech.md."""

    variant: Variant = "layerwise"
    projector_width: int = 512
    pooling: Pooling = field(default_factory=Pooling)
    steering: SteeringShape | None = None
    rank: int = 8


class SpeechModel(nn.Module):
    """Audio features and ids in, logits of the answer out. `encoder` and `decoder` are frozen and never train."""

    def __init__(self, shape: SpeechShape, encoder: nn.Module, decoder: Decoder, start_scale: float = 0.1) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = encoder.requires_grad_(False), decoder.requires_grad_(False)
        rms = float(decoder.model.embed_tokens.weight.detach().float().square().mean().sqrt())
        width = self.frozen.width * shape.pooling.widening
        self.projector = Projector(width, shape.projector_width, decoder.config.width, rms)
        self.steering: ExpertWeights | None = None
        if shape.steering and shape.variant == "lora":
            self.steering = LowRank(shape.steering, shape.rank, self.encoder)
        elif shape.steering:
            self.steering = Steering(shape.steering, start_scale)
        self.seen_by: Callable[[int, Tensor, Tensor], None] | None = None
        self.check_pooling()
        self.train(False)

    @property
    def frozen(self) -> Encoder:
        """The encoder, by what it answers."""
        return cast("Encoder", self.encoder)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.projector.fc1.weight.device

    def check_pooling(self) -> None:
        """Raise ConfigError where frames would be pooled at a layer that is not there, or stacked between layers."""
        pooling, layers = self.shape.pooling, self.frozen.num_layers
        if pooling.layer is not None and not 0 <= pooling.layer <= layers:
            raise ConfigError(
                f"speech.model.pool_layer must be between 0 and {layers}, the layers of the encoder, but is "
                f"{pooling.layer}; change it, or leave it null"
            )
        if pooling.layer is not None and pooling.kind == "stack" and pooling.kernel > 1:
            raise ConfigError(
                "speech.model.pool_kind must be mean or max where frames are pooled between layers, which have one "
                "width, but is stack; change it, or leave speech.model.pool_layer null"
            )

    def train(self, mode: bool = True) -> SpeechModel:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def encode(self, features_BFM: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model reads of the audio [B, T, W], and how many positions each utterance has."""
        pooling, encoder = self.shape.pooling, self.frozen
        x_BTD, length_B = encoder.embed(features_BFM, frames_B)
        for index in range(encoder.num_layers + 1):
            if index:
                x_BTD = self._steered(index - 1, x_BTD, length_B, "inputs")
                x_BTD = encoder.layer(index - 1, x_BTD, frame_mask(length_B, x_BTD.shape[1]))
                x_BTD = self._steered(index - 1, x_BTD, length_B, "layers")
            if pooling.layer == index:
                x_BTD, length_B = self._pooled(x_BTD, length_B)
        x_BTD = encoder.finish(x_BTD)
        x_BTD = self._steered(0, x_BTD, length_B, "output")
        if pooling.layer is None:
            x_BTD, length_B = self._pooled(x_BTD, length_B)
        return self.projector(x_BTD), length_B

    def forward(
        self, features_BFM: Tensor, frames_B: Tensor, prompt_BP: Tensor, answer_BA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of the answers' ids, and these ids [N]; ids of -1 fill prompts and answers behind."""
        audio_BTW, length_B = self.encode(features_BFM, frames_B)
        rows = list(self._prefixes(audio_BTW, length_B, prompt_BP))
        answers = [answer_A[answer_A != NO_TOKEN] for answer_A in answer_BA]
        embed = self.decoder.model.embed_tokens
        joined = [torch.cat([row, embed(ids[:-1]).to(row.dtype)]) for row, ids in zip(rows, answers, strict=True)]
        hidden_BSW = read(self.decoder, pad_sequence(joined, batch_first=True))
        ends = [len(row) - 1 for row in rows]  # where the first id of an answer is predicted
        seen = [hidden_BSW[k, end : end + len(ids)] for k, (end, ids) in enumerate(zip(ends, answers, strict=True))]
        return self.decoder.lm_head(torch.cat(seen)), torch.cat(answers)

    def _prefixes(self, audio_BTW: Tensor, length_B: Tensor, prompt_BP: Tensor) -> Iterator[Tensor]:
        """What comes before each answer, [S, W]: the audio that is there, and its prompt."""
        has_prompt = self.shape.variant != "aligner"
        for audio_TW, length, prompt_P in zip(audio_BTW, length_B.tolist(), prompt_BP, strict=True):
            ids = prompt_P[prompt_P != NO_TOKEN] if has_prompt else prompt_P[:0]
            yield torch.cat([audio_TW[:length], self.decoder.model.embed_tokens(ids).to(audio_TW.dtype)])

    def _steered(self, site: int, x_BTD: Tensor, length_B: Tensor, place: str) -> Tensor:
        if STEERED_AT.get(self.shape.variant, "layers") != place:
            return x_BTD
        if self.seen_by is not None:
            self.seen_by(site, x_BTD, length_B)
        if self.steering is None:
            return x_BTD
        return cast("Tensor", self.steering(site, x_BTD, frame_mask(length_B, x_BTD.shape[1])))

    def _pooled(self, x_BTD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        pooling = self.shape.pooling
        x_BTD = pool(x_BTD, frame_mask(length_B, x_BTD.shape[1]), pooling)
        return x_BTD, pooled_lengths(length_B, pooling.kernel)

    def transcribe(
        self, features_BFM: Tensor, frames_B: Tensor, prompt_BP: Tensor, end_token: int, max_tokens: int
    ) -> list[list[int]]:
        """The likeliest ids one after another, of each utterance up to its end or `max_tokens`."""
        with torch.inference_mode():
            audio_BTW, length_B = self.encode(features_BFM, frames_B)
            rows = list(self._prefixes(audio_BTW, length_B, prompt_BP))
            found: list[list[int]] = [[] for _ in rows]
            for size in sorted({len(row) for row in rows}):  # those of one length share a batch without masks
                same = [index for index, row in enumerate(rows) if len(row) == size]
                written = self._continued(torch.stack([rows[index] for index in same]), end_token, max_tokens)
                for index, ids in zip(same, written, strict=True):
                    found[index] = ids
        return found

    def _continued(self, x_BSW: Tensor, end_token: int, max_tokens: int) -> list[list[int]]:
        cache, columns = KeyValueCache(), list[Tensor]()
        is_over_B = torch.zeros(len(x_BSW), dtype=torch.bool, device=x_BSW.device)
        while len(columns) < max_tokens and not is_over_B.all():
            next_B = self.decoder.lm_head(read(self.decoder, x_BSW, cache)[:, -1]).argmax(dim=-1)
            columns.append(next_B)
            is_over_B |= next_B == end_token
            x_BSW = self.decoder.model.embed_tokens(next_B)[:, None].to(x_BSW.dtype)
        rows = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in range(len(x_BSW))]
        return [row[: row.index(end_token)] if end_token in row else row for row in rows]


def read(decoder: Decoder, x_BSW: Tensor, cache: KeyValueCache | None = None) -> Tensor:
    """What the decoder's head reads [B, S, W], from S embeddings, or anything of their width, behind those in a cache.

    A text router is not asked: it reads ids.
    """
    start = cache.length if cache is not None else 0
    positions = range(start, start + x_BSW.shape[1])
    cos_SH, sin_SH = rotary_angles(decoder.get_buffer("frequencies"), positions, decoder.angle_scale)
    for block in decoder.blocks:
        x_BSW = block(x_BSW, cos_SH, sin_SH, cache)
    return cast("Tensor", decoder.model.norm(x_BSW))


def speech_loss(model: nn.Module, tensors: Tensors) -> Tensor:
    """Mean cross-entropy of the answers' ids, in nats; `model` may be wrapped for several ranks.

    Of a piece of a larger batch, which `whole` tells, it is such that the mean over all pieces is that over all ids.
    """
    logits_NV, target_N = model(*(tensors[name] for name in ("features", "frames", "prompt", "answer")))
    loss = F.cross_entropy(logits_NV.float(), target_N)
    if "whole" not in tensors:
        return loss
    ids, utterances = tensors["whole"][0].tolist()
    share = len(target_N) * utterances / (len(tensors["answer"]) * ids)  # exactly 1 where it is the whole
    return cast("Tensor", loss * share)


def learning_parameters(model: SpeechModel) -> dict[str, nn.Parameter]:
    """All parameters that are not frozen, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
