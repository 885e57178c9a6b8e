"""A tiny speech run: two domains of tones, random encoder and language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modularforge.config import Config
from modularforge.pipeline import STAGES
from modularforge.run import Run
from tests.speech.sounds import words

PHASE = {"steps": 8, "batch_size": 4, "warmup_steps": 1, "peak_learning_rate": 3e-3}


def speech_config(folder: Path, sounds: Path, **changes: Any) -> Config:
    """Settings of a run in `folder` on tones in `sounds`; sections of `changes` are put over its own."""
    sources = []
    for name, pitch in (("low", 200.0), ("high", 900.0)):
        if not (sounds / name).exists():
            words(sounds / name, 48, pitch)
        sources.append({"name": name, "train": str(sounds / name / "metadata.jsonl")})
    values: dict[str, Any] = {
        "name": "tones",
        "task": "speech",
        "output_dir": str(folder),
        "data": {"sources": sources, "vocab_size": 270},
        "partition": {"method": "domain"},
        "model": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 48, "context_length": 64},
        "backbone": PHASE,
        "experts": {**PHASE, "count": 2, "kind": "steering", "statistics_tokens": 2000},
        "steering": {"vectors": 3},
        "training": {"log_every": 4, "validate_every": 8, "checkpoint_every": 3},
        "assembly": {"router": "ridge"},
        "evaluation": {"baselines": ["dense", "joint"]},
        "speech": {
            "data": {"split_field": "split"},
            "model": {"encoder_width": 32, "projector_width": 24, "pool_kernel": 3, "prompt": "text: "},
            "decoding": {"max_tokens": 4, "batch_size": 4},
        },
    }
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    return Config.model_validate(values)


def run_all(config: Config) -> dict[str, Any]:
    """Every stage in turn; returns the results of the evaluation."""
    run, results = Run(config), None
    for stage in STAGES.values():
        if stage.is_wanted(config):
            for index in stage.indices(config):
                results = run.make(stage.name, index)
    assert results is not None
    return results
