"""What the training loop carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Trainer:
    """Model and optimizer, steps done, position in the data, and the newest losses."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    position: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
