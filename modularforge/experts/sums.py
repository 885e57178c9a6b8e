"""What routers are solved from, as experts of text leave it: sums over layers' inputs, and counts of tokens."""

from __future__ import annotations

from pathlib import Path

from modularforge.assembly.card import special_tokens
from modularforge.experts.kind import ExpertJob
from modularforge.model.backbone import Decoder
from modularforge.routing.statistics import STATISTICS_NAME, save_statistics
from modularforge.routing.text_counts import COUNTS_NAME


def save_sums(expert: ExpertJob, model: Decoder, folder: Path) -> None:
    """Write the statistics and counts of a trained expert's partition, by its task."""
    save_statistics(folder / STATISTICS_NAME, expert.task.statistics(model, expert.examples, expert.device))
    special = special_tokens(expert.backbone.artifact)
    expert.task.save_counts(expert.config, expert.examples, model.vocab_size, special, folder / COUNTS_NAME)
