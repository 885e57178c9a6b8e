"""In which type a job computes: what its settings and its device allow, in training and where models are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from modularforge.config import TrainingConfig


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the settings and the device ask for it."""
    wanted = training.precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if wanted == "bf16" else nullcontext()


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
