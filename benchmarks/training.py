"""Speed of training against named references, measured in one process, interleaved: ratios, not times.

1. The loop against a bare PyTorch loop over the same model, batches and optimizer (target: at least 0.95).
2. An expert's step beside a full training step of the backbone, and that ratio beside the one of their FLOPs at the
   same shape (target: at most 1.05 of it): forward 1 + backward 1 + its own share of the other 1, of a full step's 3,
   since an expert saves the weight gradients of attention, embedding and head. The anchored one passes two FFNs.

    python benchmarks/training.py [--width 256] [--rounds 5] [--steps 10]

The floor of a step is its FLOPs over the matmul rate of the machine, printed beside what was reached.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modularforge.config import ExpertsConfig, ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.ffn.training import expert_model
from modularforge.experts.trainable import Loss, trainable
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.folder import backbone_tensors
from modularforge.model.hub_config import backbone_config
from modularforge.model.sizes import ffn_parameters, model_sizes
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT, text_batches
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import RoutedLoss
from modularforge.training.optimizer import build_optimizer

VOCABULARY, BATCH = 4096, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    model = ModelConfig(
        width=options.width, layers=4, heads=8, kv_heads=8, ffn_width=options.width * 8 // 3, context_length=256
    )
    torch.manual_seed(0)
    batch_BT = torch.randint(0, VOCABULARY, (BATCH, model.context_length + 1))
    print_floor(model)
    loop, bare = compare(
        [lambda: our_loop(model, batch_BT, options.steps), lambda: bare_loop(model, batch_BT, options.steps)],
        options.rounds,
    )
    print(f"loop:            {bare / loop:.3f} of the speed of a bare PyTorch loop (target >= 0.95)")
    full, plain, anchored = compare(
        [
            lambda: time_steps(*full_step(model), batch_BT, options.steps),
            lambda: time_steps(*expert_step(model, anchored=False), batch_BT, options.steps),
            lambda: time_steps(*expert_step(model, anchored=True), batch_BT, options.steps),
        ],
        options.rounds,
    )
    for name, seconds, share in zip(("plain", "anchored"), (plain, anchored), arithmetic(model), strict=True):
        print(
            f"{name + ' expert:':<16} {seconds / full:.3f} of the time of a full training step, {share:.3f} of its "
            f"FLOPs: {seconds / full / share:.3f} of the arithmetic (target <= 1.05)"
        )


def arithmetic(model: ModelConfig) -> tuple[float, float]:
    """FLOPs of a plain and of an anchored expert's step beside a full one's: two passes, and the third for its FFN."""
    full, own = model_sizes(model, VOCABULARY), 2 * model.layers * ffn_parameters(model)
    pair = model_sizes(model, VOCABULARY, 2, 2)
    plain, anchored = 2 * full.flops_per_token + own, 2 * pair.flops_per_token + own
    return plain / full.training_flops_per_token, anchored / full.training_flops_per_token


def compare(cases: list[Callable[[], float]], rounds: int) -> list[float]:
    """Median seconds of each case; the cases take turns, so that noise of the machine falls on all of them."""
    for case in cases:
        case()
    times = [[case() for case in cases] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@dataclass(frozen=True)
class Same:
    """The same batch again and again."""

    batch_BT: Tensor

    def batches(self, position: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """From any position on."""
        return text_batches((self.batch_BT[:, :-1], self.batch_BT[:, 1:], step) for step in itertools.count(1))


def our_loop(model: ModelConfig, batch_BT: Tensor, steps: int) -> float:
    """Seconds of `steps` steps of the project's loop."""
    decoder = build_backbone(model, VOCABULARY)
    phase = PhaseConfig(steps=steps, batch_size=BATCH, warmup_steps=2)
    training = TrainingConfig(log_every=10, validate_every=10**6, checkpoint_every=10**6)

    job = Job("benchmark", phase, training)
    start = time.perf_counter()
    fit(trainable(decoder, TEXT.loss), Same(batch_BT), job, lambda: 0.0, World())
    return time.perf_counter() - start


def bare_loop(model: ModelConfig, batch_BT: Tensor, steps: int) -> float:
    """Seconds of the same steps written out: forward, backward, clip, step."""
    decoder, step = full_step(model)
    return time_steps(decoder, step, batch_BT, steps)


def full_step(model: ModelConfig) -> tuple[Decoder, Callable[[Tensor, Tensor], None]]:
    """A backbone and one bare training step of it."""
    decoder = build_backbone(model, VOCABULARY)
    return decoder, bare_step(decoder, TEXT.loss)


def expert_step(model: ModelConfig, *, anchored: bool) -> tuple[Decoder, Callable[[Tensor, Tensor], None]]:
    """An expert's own model and one bare training step of it."""
    tensors = backbone_tensors(build_backbone(model, VOCABULARY))
    directions = [torch.zeros(model.width)] * model.layers if anchored else None
    values = backbone_config(model, VOCABULARY)
    decoder = expert_model(tensors, values, ExpertsConfig(anchored=anchored), directions).whole()
    return decoder, bare_step(decoder, RoutedLoss(decoder, TEXT.loss, 1e-3) if anchored else TEXT.loss)


def bare_step(decoder: Decoder, loss_of: Loss) -> Callable[[Tensor, Tensor], None]:
    """Forward, backward, clip and AdamW, nothing else."""
    optimizer = build_optimizer(trainable(decoder, loss_of).groups, PhaseConfig(), TrainingConfig())
    trained = [weight for weight in decoder.parameters() if weight.requires_grad]
    decoder.train()

    def step(inputs_BT: Tensor, targets_BT: Tensor) -> None:
        loss_of(decoder, {"inputs": inputs_BT, "targets": targets_BT}).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(_decoder: Decoder, step: Callable[[Tensor, Tensor], None], batch_BT: Tensor, steps: int) -> float:
    """Seconds of `steps` steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step(batch_BT[:, :-1], batch_BT[:, 1:])
    return time.perf_counter() - start


def print_floor(model: ModelConfig) -> None:
    """The physical limit of a full step beside what a bare step reaches."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for _ in range(3):
        a @ b
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    peak = 10 * 2 * 1024**3 / (time.perf_counter() - start)
    flops = model_sizes(model, VOCABULARY).training_flops_per_token * BATCH * model.context_length
    tokens = torch.randint(0, VOCABULARY, (BATCH, model.context_length + 1))
    decoder, step = full_step(model)
    seconds = min(time_steps(decoder, step, tokens, 3) / 3 for _ in range(3))
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s; a full step is {flops / 1e9:.1f} GFLOP, floor {flops / peak:.3f} s,")
    print(f"measured {seconds:.3f} s: {flops / peak / seconds:.2f} of the floor's speed")


if __name__ == "__main__":
    main()
