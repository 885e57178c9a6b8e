"""Token counts for the evidence router over more text than the model is run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from modularforge.config import Config
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.pipeline import fingerprint, stage_settings
from modularforge.training.expert_job import partition_statistics
from tests.conftest import tiny_config

VOCABULARY, TOKENS = 50, 4096


def settings(folder: Path, **experts: object) -> Config:
    return tiny_config(folder, experts={"statistics_tokens": 1024, "batch_size": 1, **experts})


def counted(folder: Path, **experts: object) -> tuple[float, float]:
    """Tokens that were counted for the evidence router, and those that the model ran on."""
    config = settings(folder, **experts)
    model: Decoder = build_backbone(config.model, VOCABULARY)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, TOKENS)
    found = partition_statistics(config, model, tokens, 0, torch.device("cpu"))
    return float(found.tokens_V.sum()), found.layers[0].count


def test_an_expert_counts_as_many_tokens_as_it_is_told_and_runs_on_no_more(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert counted(tmp_path) == (1024, 1024)
    assert counted(tmp_path, counted_tokens=2048) == (2048, 1024)


def test_a_partition_is_counted_once_at_the_most(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found, ran = counted(tmp_path, counted_tokens=1_000_000)
    assert TOKENS / 2 < found <= TOKENS
    assert ran == 1024


def test_an_expert_that_counts_as_before_keeps_its_identity(tmp_path: Path) -> None:
    def identity(**experts: object) -> str:
        return fingerprint("expert", stage_settings(settings(tmp_path, **experts), "expert"), {})

    assert "experts.counted_tokens" not in stage_settings(settings(tmp_path), "expert")
    assert identity() == identity(counted_tokens=None)
    assert identity() != identity(counted_tokens=2048)
