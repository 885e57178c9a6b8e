"""M0, M1 and M2 of the task speech: the model builds, recordings can be used, and a projector learns a few of them."""

# B batch  F feature frames  M bins

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import torch
from torch import Tensor, nn

from modularforge.config import Config, ModelConfig
from modularforge.data.corpus import SPLITS, Split
from modularforge.sanity.checks import SanityError
from modularforge.speech.encoder import WhisperShape
from modularforge.speech.folder import Part, Parts, build_speech, parts_of, shape_from
from modularforge.speech.model import NO_TOKEN, SpeechModel, learning_parameters, speech_loss
from modularforge.speech.prepare import Computed, compute
from modularforge.speech.records import utterances

QUICK_UTTERANCES, UTTERANCES = 6, 24
VOCABULARY, LETTERS = 300, 8
STEPS, RATE = 20, 3e-3
TINY = ModelConfig(width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, context_length=128)


def check_model(config: Config, quick: bool) -> Iterator[str]:
    """The model with its pretrained parts, or a tiny one of its shape; forward and backward."""
    model = _tiny(config) if quick else build_speech(shape_from(config, None, "static"), parts_of(config, VOCABULARY))
    learns = learning_parameters(model)
    yield f"it builds: {sum(weight.numel() for weight in learns.values()):,} parameters that learn"
    frames_B = torch.tensor([120, 80])
    batch = _batch(torch.randn(2, 120, config.speech.data.bins), frames_B, ["abc", "de"])
    loss = speech_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if not all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in learns.values()):
        raise SanityError("gradients of the projector must be finite, but some are not; check the pretrained parts")
    yield f"loss {float(loss.detach()):.3f}, gradients of {len(learns)} weights are finite"
    if any(weight.grad is not None for name, weight in model.named_parameters() if name not in learns):
        raise SanityError("frozen parts must get no gradients, but some do; this is a mistake of ours")
    yield "frozen parts get no gradients"


def check_data(config: Config, quick: bool) -> Iterator[str]:
    """Recordings of every source and split; raises DataError or SanityError."""
    for source in config.data.sources:
        for split in SPLITS:
            found = _some(config, source.name, split, quick)
            usable = [item for item in found if item.features is not None]
            if not usable and split == "train":
                reasons = "; ".join(sorted({item.words for item in found})) or "there are none"
                raise SanityError(
                    f"source {source.name} must have recordings that can be used, but of the first {len(found)} none "
                    f"can: {reasons}; check data.sources and speech.data"
                )
            seconds = sum(item.seconds for item in usable)
            share = f"{len(usable)} of {len(found)} recordings of {split}"
            yield f"{source.name}: {share} can be used, {seconds:.1f} seconds"


def check_training(config: Config, quick: bool) -> Iterator[str]:
    """A tiny model's loss on a few recordings falls."""
    some = _some(config, config.data.sources[0].name, "train", quick)
    found = [item for item in some if item.features is not None][:QUICK_UTTERANCES]
    if not found:
        raise SanityError("a short training must have recordings that can be used, but there are none; see M1")
    features = [torch.from_numpy(item.features) for item in found]
    padded_BFM = nn.utils.rnn.pad_sequence(features, batch_first=True)
    frames_B = torch.tensor([len(item) for item in features])
    batch = _batch(padded_BFM, frames_B, [item.utterance.text[:LETTERS] for item in found])
    model = _tiny(config)
    optimizer = torch.optim.AdamW(learning_parameters(model).values(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = speech_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise SanityError(
            f"the loss must fall, but goes from {losses[0]:.3f} to {losses[-1]:.3f}; check the recordings"
        )
    fall = f"falls from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"
    yield f"loss of {len(found)} recordings {fall}"


def _some(config: Config, name: str, split: Split, quick: bool) -> list[Computed]:
    source = next(source for source in config.data.sources if source.name == name)
    most = QUICK_UTTERANCES if quick else UTTERANCES
    settings = config.speech.data.model_copy(update={"keeps": "features"})
    return [compute(item, settings) for item in islice(utterances(config, source, split), most)]


def _tiny(config: Config) -> SpeechModel:
    """A random model that reads the run's features."""
    torch.manual_seed(0)
    positions = int(50 * config.speech.data.max_seconds) + 1
    encoder = asdict(WhisperShape(config.speech.data.bins, 32, 2, 2, 64, positions))
    decoder = {"model": TINY.model_dump(mode="json"), "vocab_size": VOCABULARY}
    parts = Parts(Part(None, None, encoder), Part(None, None, decoder))
    small = config.speech.model.model_copy(update={"projector_width": 32, "pool_layer": None})
    speech = config.speech.model_copy(update={"model": small})
    return build_speech(shape_from(config.model_copy(update={"speech": speech}), None, "static"), parts)


def _batch(features_BFM: Tensor, frames_B: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """Features with the bytes of texts as answers, and no prompt."""
    ids = [torch.tensor([*text.encode(), VOCABULARY - 1]) for text in texts]
    answer_BA = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=NO_TOKEN)
    prompt_BP = torch.full((len(texts), 1), NO_TOKEN)
    return {"features": features_BFM, "frames": frames_B, "prompt": prompt_BP, "answer": answer_BA}
