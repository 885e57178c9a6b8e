"""A steering expert's job: the backbone's projector frozen too, vectors and gates, or adapters, at their own rates."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints import Artifact
from modularforge.config import CalibrationConfig, SteeringConfig
from modularforge.errors import ConfigError
from modularforge.experts.kind import ExpertJob
from modularforge.experts.steering import FROZEN_FACT, STEERING_NAME, UTTERANCES_NAME
from modularforge.experts.trainable import Loss, ParameterGroup, Tensors, Trainable
from modularforge.facts import fact
from modularforge.model.folder import save_tensors
from modularforge.routing.statistics import STATISTICS_NAME, save_statistics
from modularforge.speech.folder import (
    encoder_sizes,
    load_speech,
    parts_in,
    read_speech_config,
    shape_of,
    trained_tensors,
)
from modularforge.speech.low_rank import LowRank
from modularforge.speech.model import STEERED_AT, SpeechModel
from modularforge.speech.steering import Steering, SteeringShape, likeness, unevenness
from modularforge.speech.sums import gather_sums

PREFIX = "steering."


def prepare(expert: ExpertJob) -> Trainable:
    """The expert's vectors and gates in the backbone's model, all else frozen."""
    return steered(expert.config.steering, expert.backbone.artifact, 1, expert.task.loss)


def steered(
    settings: SteeringConfig, backbone: Artifact, times: int, loss: Loss, trains_projector: bool = False
) -> Trainable:
    """New steering, drawn from torch's global generator, and how it is trained, perhaps with the projector.

    It has as many vectors at each site, or as large a rank, as so many experts have together.
    """
    folder = backbone.local_folder()
    steering = _shape(settings, times, *encoder_sizes(parts_in(folder)))
    shape = replace(shape_of(read_speech_config(folder)), variant=settings.variant, steering=steering)
    if settings.variant == "lora":
        shape = replace(shape, rank=times * settings.rank)
    model = load_speech(folder, shape, is_fresh=True, start_scale=settings.start_scale)
    model.projector.requires_grad_(trains_projector)
    groups = groups_of(model, settings) + ([_projector_group(model, settings)] if trains_projector else [])
    whole = loss
    if settings.balance_loss or settings.orthogonality_loss:
        whole = SteeredLoss(model, loss, settings.balance_loss, settings.orthogonality_loss)
    return Trainable(model, whole, groups, observations=lambda: observations(model))


def _projector_group(model: SpeechModel, settings: SteeringConfig) -> ParameterGroup:
    named = {f"projector.{name}": weight for name, weight in model.projector.named_parameters()}
    return ParameterGroup(named, settings.projector_rate, clip_norm=settings.clip_norm)


class SteeredLoss:
    """The loss of a task, that of uneven gates, and that of vectors which point the same way."""

    def __init__(self, model: SpeechModel, loss: Loss, balance: float, orthogonality: float) -> None:
        assert isinstance(model.steering, Steering)
        self.steering, self.loss, self.balance, self.orthogonality = model.steering, loss, balance, orthogonality

    def __call__(self, model: nn.Module, tensors: Tensors) -> Tensor:
        """Loss of one batch; `model` may be wrapped for several ranks."""
        seen = self.steering.mean_gates = []
        loss = self.loss(model, tensors)
        self.steering.mean_gates = None
        loss = loss + self.balance * unevenness(torch.stack(seen))
        return loss + self.orthogonality * likeness(self.steering.vectors)


def _shape(settings: SteeringConfig, times: int, width: int, layers: int) -> SteeringShape:
    if settings.variant == "lora":
        return SteeringShape(layers, width, 1, is_scaled=False, routing=settings.routing)
    assert settings.vectors is not None
    is_within = STEERED_AT[settings.variant] == "layers"
    own = {"active": settings.active, "scale_bound": settings.scale_bound, "is_scaled": is_within}
    sites, vectors = layers if is_within else 1, times * settings.vectors
    return SteeringShape(sites, width, vectors, routing=settings.routing, **own)  # type: ignore[arg-type]


def groups_of(model: SpeechModel, settings: SteeringConfig) -> list[ParameterGroup]:
    """Vectors and scales in one group, gates in another, neither of which decays; adapters learn as the phase says."""
    assert model.steering is not None
    named = {f"{PREFIX}{name}": weight for name, weight in model.steering.named_parameters()}
    if settings.variant == "lora":
        return [ParameterGroup(named, clip_norm=settings.clip_norm)]
    gates = {name: weight for name, weight in named.items() if ".gate_" in name}
    vectors = {name: weight for name, weight in named.items() if name not in gates}
    rates = ((vectors, settings.vector_rate), (gates, settings.gate_rate))
    return [ParameterGroup(weights, rate, 0.0, settings.clip_norm) for weights, rate in rates]


def observations(model: SpeechModel) -> dict[str, float]:
    """How strong the steering is: mean length of a vector, scales and their mean; of adapters the mean norm of B."""
    if isinstance(model.steering, LowRank):
        norms = [adapter.lora_B.detach().norm() for adapter in model.steering.adapters.values()]  # type: ignore[operator]
        return {"adapter_norm": float(torch.stack(norms).mean())}
    assert isinstance(model.steering, Steering)
    found = {"vector_norm": float(model.steering.vectors.detach().norm(dim=-1).mean())}
    if model.steering.shape.is_scaled:
        scale_L = model.steering.scale.detach()
        found["scale"] = float(scale_L.mean())
        found |= {f"scale_{layer}": value for layer, value in enumerate(scale_L.flatten().tolist())}
    return found


def save(expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write vectors, gates and sums of a trained expert; returns facts for the manifest."""
    assert isinstance(model, SpeechModel)
    assert model.shape.steering is not None
    tensors = {name: tensor for name, tensor in trained_tensors(model).items() if name.startswith(PREFIX)}
    save_tensors(tensors, folder / STEERING_NAME)
    batches = (batch.tensors for batch in cast("Any", expert.examples).sample())
    sums = gather_sums(model, batches, expert.device)
    save_statistics(folder / STATISTICS_NAME, sums.frames)
    save_statistics(folder / UTTERANCES_NAME, sums.utterances)
    rank = {"rank": model.shape.rank} if model.shape.variant == "lora" else {}
    return {
        "variant": model.shape.variant,
        **rank,
        "steering": asdict(model.shape.steering),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        FROZEN_FACT: fact(expert.backbone.artifact, FROZEN_FACT),
        "training_tokens": None,
    }


def load(backbone: Any, artifact: Artifact) -> Any:
    """An expert's own model: the backbone's, steered by this expert alone."""
    folder = backbone.artifact.local_folder()
    steering = SteeringShape(**fact(artifact, "steering"))
    shape = replace(shape_of(read_speech_config(folder)), variant=fact(artifact, "variant"), steering=steering)
    shape = replace(shape, rank=fact(artifact, "rank", shape.rank))
    return load_speech(folder, shape, load_file(artifact.local_file(STEERING_NAME)))


def calibrates(model: Any, settings: CalibrationConfig) -> dict[str, nn.Parameter]:
    """Router rows and scales of an assembled model, as the settings say."""
    wanted = {"router_weight": settings.router, "router_bias": settings.router, "scale": settings.norms}
    steering = dict(model.steering.named_parameters())
    found = {f"{PREFIX}{name}": steering[name] for name, is_wanted in wanted.items() if is_wanted and name in steering}
    if not found:
        raise ConfigError(
            "calibration must train router rows or scales, but calibration.router and calibration.norms leave none of "
            "those that this model has; set both to true, or steering.calibrates to false"
        )
    return found
