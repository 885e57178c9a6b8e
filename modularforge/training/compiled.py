"""Blocks of a model in pieces, compiled one by one for training steps alone.

The whole of such a model cannot be one graph: each block's weights are there only while it computes, and what gathers
them stays outside, as torch's own recipe has it (torchtitan). What is compiled is a block's `forward`, so that names of
parameters, hooks around the block and checkpoints are what they were. Validation and statistics take the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modularforge.model.backbone import Block


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
    compiled = torch.compile(plain)
    return lambda *inputs: (compiled if block.training else plain)(*inputs)
