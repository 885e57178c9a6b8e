"""What routers are solved from, as experts of text leave it: sums over layers' inputs, and counts of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modularforge.assembly.card import special_tokens
from modularforge.config import Config
from modularforge.experts.kind import ExpertJob
from modularforge.model.backbone import Decoder
from modularforge.routing.statistics import HEADER_FACT, STATISTICS_NAME, header_hash, save_statistics
from modularforge.routing.text_counts import COUNTS_NAME


def save_sums(expert: ExpertJob, model: Decoder, folder: Path) -> dict[str, Any]:
    """Write the statistics and counts of a trained expert's partition, by its task; returns facts for the manifest."""
    save_statistics(folder / STATISTICS_NAME, expert.task.statistics(model, expert.examples, expert.device))
    _save_counts(expert, expert.config, model.vocab_size, folder)
    return {HEADER_FACT: header_hash(folder / STATISTICS_NAME)}


def save_token_counts(expert: ExpertJob, folder: Path) -> None:
    """Write how often a partition has each token, none of its pairs: what merges between rounds may weigh rows by."""
    config = expert.config
    experts = config.experts.model_copy(update={"counted_pairs": 0})
    vocab_size = int(expert.backbone.values["vocab_size"])
    _save_counts(expert, config.model_copy(update={"experts": experts}), vocab_size, folder)


def _save_counts(expert: ExpertJob, config: Config, vocab_size: int, folder: Path) -> None:
    special = special_tokens(expert.backbone.artifact)
    expert.task.save_counts(config, expert.examples, vocab_size, special, folder / COUNTS_NAME)
