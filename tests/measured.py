"""Where models are run without gradients, and whether that is in `measuring`, which decides their type on a GPU."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import modularforge
from modularforge.training import precision

NEEDS_MORE = ("modularforge.huggingface", "modularforge.__main__")  # an extra; a command line


@dataclass
class Seen:
    """Products of matrices without gradients: how many were inside, and who asked for those outside."""

    inside: int = 0
    outside: set[str] = field(default_factory=set)


@contextmanager
def seen_without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What models do in the block, by whoever uses `measuring`; no GPU is needed to see it."""
    seen, depth, original = Seen(), 0, precision.measuring

    @contextmanager
    def recorded(training: Any, device: torch.device) -> Iterator[None]:
        nonlocal depth
        depth += 1
        with original(training, device):
            yield
        depth -= 1

    def look(module: nn.Module, _inputs: Any) -> None:
        if not isinstance(module, nn.Linear) or torch.is_grad_enabled():
            return
        if depth:
            seen.inside += 1
            return
        frames = [frame for frame in traceback.extract_stack() if "/modularforge/" in frame.filename]
        seen.outside.add(" < ".join(f"{Path(frame.filename).stem}.{frame.name}" for frame in reversed(frames)))

    for package in walk_packages(modularforge.__path__, "modularforge."):
        if not package.name.startswith(NEEDS_MORE):
            import_module(package.name)
    for name, module in [*sys.modules.items()]:
        if name.startswith("modularforge.") and getattr(module, "measuring", None) is original:
            monkeypatch.setattr(module, "measuring", recorded)
    handle = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
