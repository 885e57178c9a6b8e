"""M2: a small model trains on a sample of the corpus with the configured optimizer; its loss must fall."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from modularforge.config import Config
from modularforge.experts.trainable import trainable
from modularforge.model.backbone import build_backbone
from modularforge.observe.metrics import Curve, parse_metrics
from modularforge.sanity.checks import SanityError
from modularforge.sanity.data import require_hub, sample_texts, tokenise_sample
from modularforge.sanity.model import small_model
from modularforge.tasks.text import TEXT, TextExamples, TextValidation
from modularforge.training.distributed import World, default_device
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss

BATCH, LEAST_FALL = 8, 0.05  # of the first loss; even the quick training falls by an eighth
QUICK = {"documents": 8, "vocab_size": 300, "width": 48, "steps": 30}
FULL = {"documents": 40, "vocab_size": 1024, "width": 96, "steps": 120}


def check_training(config: Config, quick: bool) -> Iterator[str]:
    """Train and judge the curve; raises DataError, TrainingError or SanityError."""
    size = QUICK if quick else FULL
    if quick:
        require_hub(config)
    tokenizer, tokens = tokenise_sample(sample_texts(config, size["documents"]), size["vocab_size"])
    shape, world = small_model(config.model, size["width"]), World(device=default_device())
    held_out = tokens[-4 * BATCH * shape.context_length - 1 :]
    torch.manual_seed(config.seed)
    model = build_backbone(shape, tokenizer.get_vocab_size())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        losses = fit(
            trainable(model, TEXT.loss),
            TextExamples(tokens, shape.context_length, BATCH, config.seed, "the sample"),
            _job(config, size["steps"], str(path)),
            lambda: mean_loss(model, TextValidation(held_out, shape.context_length, BATCH), world),
            world,
        )
        curve = parse_metrics("sanity", path.read_bytes()).curves["loss"]
    yield judge_fall(curve, LEAST_FALL)
    yield f"validation loss {losses['validation_loss']:.3f} at the end; metrics were written and read"


def judge_fall(curve: Curve, least: float) -> str:
    """Compare the first with the last tenth of a training; raises SanityError when the loss fell too little."""
    tenth = max(1, len(curve) // 10)
    first, last = float(curve.values[:tenth].mean()), float(curve.values[-tenth:].mean())
    if not last < (1 - least) * first:
        raise SanityError(
            f"the loss must fall by {100 * least:.0f} % in {int(curve.steps[-1])} steps, but goes from {first:.3f} to "
            f"{last:.3f}; check backbone.peak_learning_rate, training.clip_norm, and that the data is text"
        )
    return f"loss falls from {first:.3f} to {last:.3f} in {int(curve.steps[-1])} steps"


def _job(config: Config, steps: int, metrics_url: str) -> Job:
    """The backbone's settings, at the length of a check."""
    phase = config.backbone.model_copy(
        update={"steps": steps, "batch_size": BATCH, "accumulation_steps": 1, "warmup_steps": max(1, steps // 20)}
    )
    often = {"log_every": 1, "validate_every": max(1, steps // 2), "checkpoint_every": steps + 1, "compile": False}
    return Job("sanity", phase, config.training.model_copy(update=often), metrics_url=metrics_url, speaks=False)
