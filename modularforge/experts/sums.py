"""What routers are solved from, as experts of text leave it: sums over layers' inputs, and counts of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modularforge.assembly.card import special_tokens
from modularforge.experts.kind import ExpertJob
from modularforge.model.backbone import Decoder
from modularforge.routing.statistics import HEADER_FACT, STATISTICS_NAME, header_hash, save_statistics
from modularforge.routing.text_counts import COUNTS_NAME


def save_sums(expert: ExpertJob, model: Decoder, folder: Path) -> dict[str, Any]:
    """Write the statistics and counts of a trained expert's partition, by its task; returns facts for the manifest."""
    save_statistics(folder / STATISTICS_NAME, expert.task.statistics(model, expert.examples, expert.device))
    special = special_tokens(expert.backbone.artifact)
    expert.task.save_counts(expert.config, expert.examples, model.vocab_size, special, folder / COUNTS_NAME)
    return {HEADER_FACT: header_hash(folder / STATISTICS_NAME)}
