"""What the evidence of an assembled model is made of, without its experts: how often each token occurs where."""

# V vocabulary

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from checkpoints import Artifact
from modularforge.artifacts import token_file
from modularforge.assembly.routing import Array
from modularforge.config import Config
from modularforge.training.expert_job import partition_sample


def partition_counts(config: Config, partitions: Artifact, vocab_size: int) -> list[Array]:
    """Token counts [V] of each partition, over the very text that its expert's job counts."""
    return [
        _counts(config, token_file(partitions, f"partition-{index}").tokens, index, vocab_size)
        for index in range(config.experts.count)
    ]


def _counts(config: Config, tokens: Any, index: int, vocab_size: int) -> Array:
    counts_V = torch.zeros(vocab_size, dtype=torch.float64)
    for tokens_BT in partition_sample(config, tokens, index):
        counts_V += torch.bincount(tokens_BT.flatten(), minlength=vocab_size)
    found_V: Array = np.asarray(counts_V)
    return found_V
