"""Seconds of training steps: of the project's own loop, and of the loop that anyone would write."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training import Same
from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import Trainable
from modularforge.training.distributed import World, default_device
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.precision import autocast

LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A model and a batch; `every` steps are one measurement, of which there are `times`, after as many to warm up."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    vocabulary: int
    experts: int
    every: int
    times: int
    compiles: bool

    @property
    def model(self) -> ModelConfig:
        """The backbone's shape."""
        ffn, context = -(-self.width * 8 // (3 * 64)) * 64, self.context
        return ModelConfig(
            width=self.width, layers=self.layers, heads=self.heads, kv_heads=self.heads, ffn_width=ffn,
            context_length=context, tied_head=True,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.context

    def batch_BT(self) -> Tensor:
        """Windows with one token more than the context."""
        return torch.randint(0, self.vocabulary, (self.batch, self.context + 1))


def our_steps(trainable: Trainable, shape: Shape, compiles: bool) -> list[float]:
    """Seconds per step of the project's loop, as it trains: `fit` validates with what looks at the clock."""
    marks: list[float] = []

    def validate() -> float:
        marks.append(now())
        return 0.0

    every = shape.every
    phase = PhaseConfig(steps=every * (shape.times + 1), batch_size=shape.batch, warmup_steps=1)
    training = TrainingConfig(compile=compiles, validate_every=every, checkpoint_every=10**9)
    job = Job("speed", phase, training, speaks=False)
    fit(trainable, Same(shape.batch_BT()), job, validate, World(device=default_device()))
    return between(marks, every)


def bare_steps(model: nn.Module, loss_of: LossOf, shape: Shape, compiles: bool) -> list[float]:
    """Seconds per step of nanoGPT's loop: bf16 autocast, fused AdamW, clipping, a pinned batch sent ahead."""
    device, training = default_device(), TrainingConfig()
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    called: Any = torch.compile(model) if compiles else model
    tokens_BT = shape.batch_BT()
    tokens_BT = tokens_BT.pin_memory() if device.type == "cuda" else tokens_BT
    marks, batch_BT = list[float](), tokens_BT.to(device, non_blocking=True)
    for step in range(1, shape.every * (shape.times + 1) + 1):
        with autocast(training, device):
            loss = loss_of(called, batch_BT[:, :-1], batch_BT[:, 1:])
        batch_BT = tokens_BT.to(device, non_blocking=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % shape.every == 0:
            marks.append(now())
    return between(marks, shape.every)


def now() -> float:
    """The time when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def between(marks: list[float], steps: int) -> list[float]:
    """Seconds per step from mark to mark."""
    return [(end - start) / steps for start, end in pairwise(marks)]


def forget() -> None:
    """Give back what the last case held, so that the next one's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
