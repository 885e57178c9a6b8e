"""Tiny random speech models and batches; every dimension has a size of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modularforge.config import ModelConfig
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.speech.encoder import WhisperEncoder, WhisperShape
from modularforge.speech.model import STEERED_AT, SpeechModel, SpeechShape
from modularforge.speech.projector import Pooling
from modularforge.speech.steering import SteeringShape

ENCODER = WhisperShape(bins=10, width=16, layers=3, heads=2, ffn_width=24, positions=40)
VOCABULARY, LAST = 23, 22


def tiny_encoder() -> WhisperEncoder:
    return WhisperEncoder(ENCODER).requires_grad_(False).eval()


def tiny_decoder() -> Decoder:
    shape = ModelConfig(width=12, layers=2, heads=2, kv_heads=1, ffn_width=20, context_length=64, tied_head=False)
    decoder = build_backbone(shape, VOCABULARY)
    with torch.no_grad():  # a frozen head that is untrained says nothing, whatever it reads
        for weight in decoder.parameters():
            weight.mul_(1 if weight.dim() == 1 else 12)
        decoder.model.embed_tokens.weight.mul_(2)
    return decoder


def tiny_model(
    variant: Any = "layerwise", pooling: Pooling | None = None, seed: int = 0, **steering: Any
) -> SpeechModel:
    torch.manual_seed(seed)
    encoder, decoder = tiny_encoder(), tiny_decoder()
    place = STEERED_AT.get(variant)
    sites = 1 if place == "output" else ENCODER.layers
    chosen = {"vectors": 1 if variant == "lora" else 5, "is_scaled": place == "layers", **steering}
    shape = SpeechShape(
        variant, 18, pooling or Pooling(2, "mean"), SteeringShape(sites, ENCODER.width, **chosen) if place else None, 2
    )
    return SpeechModel(shape, encoder, decoder)


def tiny_batch(seed: int = 0) -> dict[str, Tensor]:
    """Three utterances of different lengths, prompts and answers."""
    make = torch.Generator().manual_seed(seed)
    frames_B = torch.tensor([9, 21, 14])
    features_BFM = torch.randn(3, 21, 10, generator=make)
    ids = torch.randint(0, LAST, (3, 9), generator=make)
    prompt_BP, answer_BA = ids[:, :4].clone(), ids[:, 4:].clone()
    prompt_BP[0, 2:], answer_BA[1, 3:] = -1, -1
    for answer_A in answer_BA:
        answer_A[int((answer_A >= 0).sum()) - 1] = LAST
    return {"features": features_BFM, "frames": frames_B, "prompt": prompt_BP, "answer": answer_BA}


def one_of(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One utterance of a batch, without its padding."""
    frames = int(batch["frames"][index])
    found = {"features": batch["features"][index : index + 1, :frames], "frames": batch["frames"][index : index + 1]}
    for name in ("prompt", "answer"):
        ids = batch[name][index]
        found[name] = ids[ids >= 0][None]
    return found
