"""What measuring the norms of gradients costs: the loop with and without it, interleaved in one process: a ratio.

    python benchmarks/gradient_norms.py [--width 192] [--rounds 21] [--steps 20] [--every 10]

The target is a step that takes at most 3 % longer on the mean at `training.gradient_norms: 10`. The loop writes metrics
and norms to a scratch folder, as a job does; a round is `--steps` steps with norms and as many without, which of them
first takes turns. Seconds are those of this process's processor, in which other programs do not count; the median of
the rounds' ratios is what is claimed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training import BATCH, VOCABULARY, Same
from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import trainable
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit

MOST = 1.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ModelConfig(
        width=options.width, layers=8, heads=4, kv_heads=4, ffn_width=options.width * 8 // 3, context_length=64
    )
    decoder = build_backbone(model, VOCABULARY)
    batch_BT = torch.randint(0, VOCABULARY, (BATCH, model.context_length + 1))
    seconds_of(decoder, batch_BT, 2, 1)
    ratios = [round_of(decoder, batch_BT, options, number) for number in range(options.rounds)]
    ratio, spread = statistics.median(ratios), (min(ratios), max(ratios))
    learns = sum(weight.numel() for weight in decoder.parameters())
    print(f"{learns / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, norms every {options.every} steps:")
    print(f"{ratio:.4f} of the time without them (rounds {spread[0]:.4f} to {spread[1]:.4f}; target <= {MOST})")
    return int(ratio > MOST)


def round_of(decoder: Decoder, batch_BT: torch.Tensor, options: argparse.Namespace, number: int) -> float:
    """Seconds with norms over those without; the first of a round takes turns."""
    cases = [options.every, 0] if number % 2 else [0, options.every]
    seconds = {every: seconds_of(decoder, batch_BT, options.steps, every) for every in cases}
    return seconds[options.every] / seconds[0]


def seconds_of(decoder: Decoder, batch_BT: torch.Tensor, steps: int, every: int) -> float:
    """Processor seconds of `steps` steps, with norms every so many, 0 without."""
    phase = PhaseConfig(steps=steps, batch_size=BATCH, warmup_steps=2)
    training = TrainingConfig(validate_every=10**6, checkpoint_every=10**6, gradient_norms=every)
    with tempfile.TemporaryDirectory() as scratch:
        job = Job("benchmark", phase, training, metrics_url=f"{scratch}/metrics/benchmark.jsonl", speaks=False)
        start = time.process_time()
        fit(trainable(decoder, TEXT.loss), Same(batch_BT), job, lambda: 0.0, World())
        return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
