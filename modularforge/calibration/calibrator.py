"""Fit norm gains and router rows on validation data with all else frozen, and keep them only if they help.

LayerNorms hold no running statistics, so what can be calibrated are their gains (REPAIR, arXiv 2211.08403). The text is
split by documents: one half is trained on, the other decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from modularforge.config import Config
from modularforge.data.token_files import TokenFile, Tokens
from modularforge.evaluation.losses import Measurement, measure
from modularforge.experts.kind import kind_of
from modularforge.experts.trainable import ParameterGroup, Trainable
from modularforge.model.backbone import Decoder
from modularforge.tasks.text import TEXT, TextExamples
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit


@dataclass(frozen=True)
class Calibration:
    """Equal-weight mean loss on the deciding half before and after, and the tensors that changed (by name)."""

    before: float
    after: float
    tensors: dict[str, Tensor]

    @property
    def kept(self) -> bool:
        """Whether the held-out loss improved."""
        return self.after < self.before


def split_documents(file: TokenFile, labels: list[str]) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Two halves of a split by alternating documents, as token streams per label; a lone document decides."""
    fit_half: dict[str, Tokens] = {}
    decide_half: dict[str, Tokens] = {}
    for index, label in enumerate(labels):
        documents = [file.document(int(i)) for i in np.flatnonzero(file.labels == index)]
        for half, chosen in ((decide_half, documents[::2]), (fit_half, documents[1::2])):
            if chosen:
                half[label] = np.concatenate(chosen)
    return fit_half, decide_half


def calibrate(
    model: Decoder,
    config: Config,
    fit_tokens: Tokens,
    decide: Mapping[str, Tokens],
    byte_lengths: Tensor,
    job: Job,
    seed: int,
) -> Calibration:
    """Train the chosen parameters on `fit_tokens`; `decide` holds the streams per domain that judge the result.

    It computes in float32, but what it returns and judges has the types that the model came with.
    """
    world = World(device=model.lm_head.weight.device)

    def held_out() -> Measurement:
        evaluation = config.evaluation
        limits = evaluation.batch_size, evaluation.tokens_per_domain
        return measure(model, decide, byte_lengths, *limits, world.device, context)

    stored = {name: weight.dtype for name, weight in model.named_parameters()}
    model.float()
    learns = choose_parameters(model, config)
    context = min(config.model.context_length, model.config.positions)
    before, batch = held_out().mean_loss, config.calibration.batch_size
    fit(
        Trainable(model, TEXT.loss, [ParameterGroup(learns)]),
        TextExamples(fit_tokens, context, batch, seed, "the calibration half of validation"),
        job,
        lambda: held_out().mean_loss,
        world,
    )
    changed = {}
    for name, weight in learns.items():
        changed[name] = weight.detach().cpu().to(stored[name])
        weight.data.copy_(changed[name])  # judged as it will be stored
    return Calibration(before, held_out().mean_loss, changed)


def choose_parameters(model: Decoder, config: Config) -> Mapping[str, nn.Parameter]:
    """Let only those parameters learn that the experts' kind lets a calibration touch; returns them by name."""
    model.requires_grad_(False)
    learns = kind_of(config).calibrates(model, config.calibration)
    for weight in learns.values():
        weight.requires_grad_(True)
    return learns


def even_mixture(streams: Mapping[str, Tokens]) -> Tokens:
    """The streams one after another, each cut to the length of the shortest, so that all domains weigh alike."""
    shortest = min(len(tokens) for tokens in streams.values())
    return np.concatenate([tokens[:shortest] for tokens in streams.values()])
