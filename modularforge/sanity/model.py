"""M0: backbone and assembled model are built with random weights and must behave as untrained models do."""

# B batch  T tokens  V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from modularforge.config import Config, ModelConfig
from modularforge.model.backbone import INITIAL_STD, Decoder, build_backbone, cross_entropy
from modularforge.model.moe import build_moe
from modularforge.model.sizes import model_sizes
from modularforge.sanity.checks import SanityError
from modularforge.training.distributed import default_device

BATCH, TOKENS = 2, 64
LOSS_TOLERANCE = 0.4  # nats, of one small random batch, beyond what the weights' variance adds (`loss_tolerance`)
CPU_PARAMETERS = 100_000_000  # more take minutes on a core
GPU_BYTES_PER_PARAMETER = 24  # weight, gradient and what the passes keep, in float32, with room to spare
SMALL_VOCABULARY = 512


def check_model(config: Config, quick: bool) -> Iterator[str]:
    """Findings about backbone and assembled model; raises SanityError."""
    shape, vocab_size = config.model, config.data.vocab_size
    if quick or not fits(config, vocab_size):
        shape, vocab_size = small_model(shape, 64), SMALL_VOCABULARY
        yield "a small model of the same kind is checked" + ("" if quick else ", the configured one is too large here")
    experts, active = config.assembled_experts, config.assembly.experts_per_token
    torch.manual_seed(config.seed)
    device = default_device()
    with device:
        backbone = build_backbone(shape, vocab_size)
    yield from check_untrained("backbone", backbone, model_sizes(shape, vocab_size).parameters)
    del backbone
    with device:
        assembled = build_moe(shape, vocab_size, experts, active)
    expected = model_sizes(shape, vocab_size, experts, active).parameters
    yield from check_untrained(f"assembled model of {experts} experts", assembled, expected)


def check_untrained(name: str, model: Decoder, expected_parameters: int) -> Iterator[str]:
    """Parameters as computed, logits finite, loss near ln V, and a finite gradient for every weight that was used."""
    parameters = sum(weight.numel() for weight in model.parameters())
    if parameters != expected_parameters:
        raise SanityError(f"the {name} must have {expected_parameters:,} parameters, but has {parameters:,}; a bug")
    yield f"{name}: builds, {parameters:,} parameters as computed"
    loss = _forward(name, model)
    expected, tolerance = math.log(model.vocab_size), loss_tolerance(model.config)
    if abs(float(loss.detach()) - expected) > tolerance:
        raise SanityError(
            f"the loss of the untrained {name} must be near ln V = {expected:.3f} (within {tolerance:.2f}), but is "
            f"{float(loss.detach()):.3f}; its initial weights are too large or the targets are wrong"
        )
    yield f"{name}: loss {float(loss.detach()):.3f}, ln V is {expected:.3f}"
    yield _backward(name, model, loss)


def loss_tolerance(model: ModelConfig) -> float:
    """Logits of variance s add s / 2 to the loss of an untrained model; here s is width times the weights' variance."""
    return LOSS_TOLERANCE + model.width * INITIAL_STD**2


def _forward(name: str, model: Decoder) -> torch.Tensor:
    device = next(model.parameters()).device
    length = min(TOKENS, model.config.context_length)
    tokens_BT = torch.randint(0, model.vocab_size, (BATCH, length + 1), device=device)
    logits_BTV = model(tokens_BT[:, :-1])
    wanted = (BATCH, length, model.vocab_size)
    if tuple(logits_BTV.shape) != wanted or not torch.isfinite(logits_BTV).all():
        raise SanityError(
            f"the {name} must give finite logits of shape {wanted}, but gives {tuple(logits_BTV.shape)}, "
            f"{int((~torch.isfinite(logits_BTV)).sum())} of them not finite; lower the initial weights"
        )
    return cross_entropy(logits_BTV, tokens_BT[:, 1:])


def _backward(name: str, model: Decoder, loss: torch.Tensor) -> str:
    """An expert that no token visited has no gradient, and none else may be without."""
    loss.backward()  # type: ignore[no-untyped-call]
    without = [key for key, weight in model.named_parameters() if weight.grad is None and ".experts." not in key]
    infinite = [k for k, w in model.named_parameters() if w.grad is not None and not torch.isfinite(w.grad).all()]
    for names, what in ((without, "get a gradient, but gets none"), (infinite, "have a finite gradient, but has not")):
        if names:
            raise SanityError(f"{names[0]} of the {name} must {what} ({len(names)} such weights); a bug in the model")
    used = sum(weight.grad is not None for weight in model.parameters())
    return f"{name}: gradients of {used} weights are finite"


def fits(config: Config, vocab_size: int) -> bool:
    """Whether the assembled model can be run forward and backward here within seconds."""
    parameters = model_sizes(config.model, vocab_size, config.assembled_experts, config.assembly.experts_per_token)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return parameters.parameters * GPU_BYTES_PER_PARAMETER < free
    return parameters.parameters <= CPU_PARAMETERS


def small_model(model: ModelConfig, width: int) -> ModelConfig:
    """The same kind of model with 2 layers, 4 heads and short contexts."""
    return model.model_copy(
        update={
            "width": width,
            "layers": 2,
            "heads": 4,
            "kv_heads": 4 if model.kv_heads == model.heads else 2,
            "ffn_width": 8 * (width // 3),
            "context_length": min(64, model.context_length),
            "pretrained": None,
            "head_width": None,
            "max_positions": None,
        }
    )
