"""AdamW and its schedule, and the optimizer's state as plain named tensors for checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modularforge.config import PhaseConfig, TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(model: nn.Module, phase: PhaseConfig, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; matrices decay, norm gains and embeddings do not."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [weight for name, weight in trained if weight.dim() == 2 and "embed_tokens" not in name]
    plain = [weight for name, weight in trained if weight.dim() != 2 or "embed_tokens" in name]
    groups = [{"params": decayed, "weight_decay": phase.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=phase.peak_learning_rate,
        betas=(training.beta1, training.beta2),
        fused=True,
    )


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate of a step (0-based): linear warm-up, then a cosine from the peak to its final share."""
    if step < phase.warmup_steps:
        return phase.peak_learning_rate * (step + 1) / phase.warmup_steps
    length = max(1, phase.steps - phase.warmup_steps)
    share = min(1.0, (step - phase.warmup_steps) / length)
    floor = phase.final_learning_rate_ratio
    return phase.peak_learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that require gradients, by name; tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained weights, AdamW's moments and torch's random state, each under a name of its own."""
    tensors = {f"weights.{name}": weight.detach() for name, weight in trained_parameters(model).items()}
    for name, weight in trained_parameters(model).items():
        for moment, value in optimizer.state.get(weight, {}).items():
            tensors[f"{moment}.{name}"] = value
    tensors["random_state"] = torch.get_rng_state()
    return tensors


def restore_training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `training_tensors` returned; names and shapes must be this model's."""
    with torch.no_grad():
        for name, weight in trained_parameters(model).items():
            weight.copy_(tensors[f"weights.{name}"])
            moments = {moment: tensors.get(f"{moment}.{name}") for moment in MOMENTS}
            if moments["step"] is not None:
                on_device = {k: v.to(weight.device, copy=True) for k, v in moments.items() if v is not None}
                optimizer.state[weight] = on_device
    # A copy: tensors read from a file may lie at addresses that torch's vector code cannot take.
    torch.set_rng_state(tensors["random_state"].clone())
