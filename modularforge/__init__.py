"""ModularForge trains one mixture-of-experts language model as many independent jobs.

What is below is the notebook's way in; it loads torch only when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modularforge.notebook import (
        Evaluator,
        LayerNormCalibrator,
        ModuleTrainer,
        SharedTrainer,
        StreamingAssembler,
        open_run,
    )

__version__ = "0.2.0"
__all__ = ["Evaluator", "LayerNormCalibrator", "ModuleTrainer", "SharedTrainer", "StreamingAssembler", "open_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("modularforge.notebook"), name)
    raise AttributeError(f"module 'modularforge' has no attribute {name!r}")
