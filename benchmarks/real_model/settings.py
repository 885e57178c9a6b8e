"""The settings of the run on a real model, and what is tried before rates and batches are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modularforge.config import Config
from modularforge.config_files import complete_config

DOMAINS = ("french_novels", "law", "c_code", "mathematics")
GENERAL_TEXTS = ("english_novels", "dialogue", "encyclopedia", "python_code", "biomedical", "standards")
"""Domains that no expert is trained on."""
TUNED_ON = (0, 2)  # partitions: one that the backbone hardly knows, one that it knows well
CONTEXT = 512


@dataclass(frozen=True)
class Trial:
    """A learning rate and a batch (windows in one step) to try."""

    rate: float
    batch: int = 1


TRIALS = {
    "experts": [Trial(1e-4), Trial(3e-4), Trial(1e-3)],
    "dense": [Trial(1e-4), Trial(1e-4, 4), Trial(3e-4, 4)],
    "lora": [Trial(3e-4), Trial(1e-3), Trial(1e-3, 4)],
    "lora_wide": [Trial(1e-3)],  # the best of `lora`: a trial costs as much as all experts' training
    "lora_experts": [Trial(3e-4), Trial(1e-3), Trial(3e-3)],
}
RANK = 16
RANKS = {"lora": RANK, "lora_wide": RANK * len(DOMAINS)}
"""Of the adapters that are trained on all windows, by baseline; an expert's is RANK. They count double (alpha)."""
ADAPTER_EXPERTS = {"kind": "lora", "lora": {"rank": RANK, "alpha": 2.0 * RANK, "targets": "both"}}


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured: windows of CONTEXT tokens for each expert, tokens of each domain."""

    steps: int = 64
    tuning_steps: int = 32
    statistics_tokens: int = 8192
    validation_tokens: int = 4096
    measured_tokens: int = 4096
    trials: dict[str, list[Trial]] = field(default_factory=lambda: TRIALS)


def run_config(
    model: Path, texts: Path, output: Path, scale: Scale, precision: str, rate: float = 3e-4, **changes: Any
) -> Config:
    """Settings of the run; experts train at `rate`, and `changes` are further settings by section."""
    sources = [
        {
            "name": name,
            "train": str(texts / name / "train.jsonl.gz"),
            "validation": str(texts / name / "valid.jsonl.gz"),
            "test": str(texts / name / "test.jsonl.gz"),
        }
        for name in DOMAINS
    ]
    values: dict[str, Any] = {
        "name": "SmolLM2-135M-Instruct, four domains",
        "output_dir": str(output / "run"),
        "data": {"sources": sources},
        "partition": {"method": "domain"},
        "model": {"pretrained": str(model), "context_length": CONTEXT},
        "training": {
            "precision": precision,
            "log_every": 8,
            "validate_every": 100_000,
            "validation_tokens": scale.validation_tokens,
            "checkpoint_every": 100_000,
        },
        "backbone": {"steps": 0},
        "experts": {
            "count": len(DOMAINS),
            "steps": scale.steps,
            "batch_size": 1,
            "peak_learning_rate": rate,
            "warmup_steps": 4,
            "statistics_tokens": scale.statistics_tokens,
        },
        "evaluation": {"batch_size": 4, "tokens_per_domain": scale.measured_tokens},
    }
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings}
    return complete_config(values, "the benchmark's settings")
