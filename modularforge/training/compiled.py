"""Whether a job is compiled, and blocks of a model in pieces, compiled one by one for training steps alone.

The whole of such a model cannot be one graph: each block's weights are there only while it computes, and what gathers
them stays outside, as torch's own recipe has it (torchtitan). What is compiled is a block's `forward`, so that names of
parameters, hooks around the block and checkpoints are what they were. Validation and statistics take the plain one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from modularforge.model.backbone import Block, Decoder
from modularforge.model.moe import SparseMoE
from modularforge.model.text_router import TextRouter
from modularforge.training.job import Job

LONG = 1000  # steps from which a graph, which takes a minute or so to make, is worth it
C_COMPILERS = ("cc", "gcc", "clang")
# What is in no graph, and whether what it calls is not either. Groups of visits have other sizes in every step: a graph
# of their sum would be made anew for each until torch gives up; the loop over tokens would be unrolled.
OUTSIDE: tuple[tuple[type[nn.Module], str, bool], ...] = (
    (SparseMoE, "_visit", False),
    (TextRouter, "forward", True),
)


def is_compiled(job: Job, model: nn.Module, device: torch.device) -> bool:
    """Whether a job's steps are compiled, by its settings or, where they leave it open, as `training.compile` says.

    It follows from settings, model and machine alone, so that a job which goes on does as before. Inputs of a speech
    model have another shape in every step.
    """
    if job.training.compile is not None:
        return job.training.compile
    suits = device.type == "cuda" and isinstance(model, Decoder) and job.phase.steps >= LONG
    return suits and _chooses_by_rule() and _can_build_kernels()


def compiled(function: Any) -> Any:
    """`torch.compile`, with kernels that are not chosen by time where another choice gives other bits: a job that goes
    on would choose anew.
    """
    if _chooses_by_rule():
        _inductor().deterministic = True
    _keep_outside()
    return torch.compile(function)


@cache
def _keep_outside() -> None:
    """Not by decorators: these would import torch._dynamo, which takes a second, in processes that compile nothing."""
    for owner, name, recursive in OUTSIDE:
        setattr(owner, name, torch.compiler.disable(getattr(owner, name), recursive=recursive))  # type: ignore[no-untyped-call]


def _inductor() -> Any:
    from torch._inductor import config  # as it takes a second

    return config


def _chooses_by_rule() -> bool:
    return hasattr(_inductor(), "deterministic")


def _can_build_kernels() -> bool:
    named = os.environ.get("CC")
    return find_spec("triton") is not None and any(map(shutil.which, [named] if named else C_COMPILERS))


@contextmanager
def compiled_blocks(model: nn.Module, is_wanted: bool) -> Iterator[None]:
    """Let the blocks of a model be compiled while it is in training mode, where that is wanted; plain behind it."""
    blocks = [module for module in model.modules() if isinstance(module, Block)] if is_wanted else []
    for block in blocks:
        block.forward = _in_training(block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _in_training(block: Block) -> Callable[..., Any]:
    plain = block.forward
    graph = compiled(plain)
    return lambda *inputs: (graph if block.training else plain)(*inputs)
