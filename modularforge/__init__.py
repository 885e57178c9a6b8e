"""ModularForge trains one mixture-of-experts language model as many independent jobs.

The classes below are the notebook's way in; they load torch only when they are first used.
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
    )

__version__ = "0.1.0"
__all__ = ["Evaluator", "LayerNormCalibrator", "ModuleTrainer", "SharedTrainer", "StreamingAssembler"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("modularforge.notebook"), name)
    raise AttributeError(f"module 'modularforge' has no attribute {name!r}")
