"""In which type a job computes: what its settings and its device allow, in training and where models are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from modularforge.config import TrainingConfig


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the settings and the device ask for it."""
    return torch.autocast(device.type, torch.bfloat16) if is_half(training, device) else nullcontext()


def is_half(training: TrainingConfig, device: torch.device) -> bool:
    """Whether matrices are multiplied in bf16."""
    if training.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return training.precision == "bf16"


def keeps_types(training: TrainingConfig, device: torch.device) -> bool:
    """Whether what is frozen stays in the type that it is stored in: autocast casts it to bf16 anyway.

    On a CPU all is float32 as ever: models are measured there without autocast, and last bits are recorded.
    """
    return device.type == "cuda" and is_half(training, device)


@contextmanager
def measuring(training: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Validation, evaluation and statistics: on a GPU in the type that training has there, and TF32 for what is left.

    On a CPU they are in float32 as ever, whatever the precision of training: their last bits are recorded.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    with autocast(training, device) as active:
        torch.backends.cuda.matmul.allow_tf32 = before or active is not None
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
