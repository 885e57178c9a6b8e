"""Tests marked `gpu` run where there is one, and on a CPU where that is asked for: so they are known to be right."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu.marked import ON_CPU
from modularforge.training.distributed import default_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; a CPU only where the variable says so."""
    if not torch.cuda.is_available() and not os.environ.get(ON_CPU):
        pytest.skip(f"there is no GPU; {ON_CPU}=1 runs these on the CPU")
    return default_device()
