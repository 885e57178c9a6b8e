"""Fit norm gains and router rows on validation data with all else frozen, and keep them only if they help.

LayerNorms hold no running statistics, so what can be calibrated are their gains (REPAIR, arXiv 2211.08403). The text is
split by documents: one half is trained on, the other decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from modularforge.config import CalibrationConfig, Config
from modularforge.data.loader import batches
from modularforge.data.token_files import TokenFile, Tokens
from modularforge.errors import ConfigError
from modularforge.evaluation.scoring import even_loss
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import language_loss


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
    job: Job,
    seed: int,
) -> Calibration:
    """Train the chosen parameters on `fit_tokens`; `decide` holds the streams per domain that judge the result.

    It computes in float32, but what it returns and judges has the types that the model came with.
    """
    world = World(device=model.lm_head.weight.device)

    def held_out() -> float:
        limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain
        return even_loss(model, decide, context, *limits)

    stored = {name: weight.dtype for name, weight in model.named_parameters()}
    model.float()
    choose_parameters(model, config.calibration)
    context = min(config.model.context_length, model.config.positions)
    before, batch = held_out(), config.calibration.batch_size
    fit(
        model,
        language_loss,
        job,
        lambda position: batches(fit_tokens, context, batch, seed, position, name="the calibration half of validation"),
        held_out,
        world,
    )
    changed = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            changed[name] = weight.detach().cpu().to(stored[name])
            weight.data.copy_(changed[name])  # judged as it will be stored
    return Calibration(before, held_out(), changed)


def choose_parameters(model: Decoder, settings: CalibrationConfig) -> None:
    """Let only norm gains and router rows learn, as the settings say."""
    rows = settings.router and model.text_router is None  # which routes in their place
    for name, weight in model.named_parameters():
        weight.requires_grad_((settings.norms and names.is_norm(name)) or (rows and names.is_gate(name)))
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ConfigError(
            "calibration must train norms or a router's rows, but calibration.norms is false and the model routes by "
            "tables; set calibration.norms to true, assembly.token_pairs to 0, or leave calibration out"
        )
    final = model.model.norm.weight
    if final.requires_grad:
        # Zero gains hide the router's channels from the head, and stay so.
        is_seen_D = final.detach() != 0
        final.register_hook(lambda gradient_D: gradient_D * is_seen_D)  # type: ignore[no-untyped-call]


def even_mixture(streams: Mapping[str, Tokens]) -> Tokens:
    """The streams one after another, each cut to the length of the shortest, so that all domains weigh alike."""
    shortest = min(len(tokens) for tokens in streams.values())
    return np.concatenate([tokens[:shortest] for tokens in streams.values()])
