"""Memory and speed of a training step with all logits at once, and with the head's loss in pieces: ratios, not sizes.

    python benchmarks/head.py [--vocabulary 49152] [--tokens 2048] [--width 512] [--layers 4] [--rounds 5]

Targets at 49k entries and 2k tokens: at most 0.6 of the memory, at least the same speed. Memory is what a process of
its own takes at its peak for two steps (weights, gradients, moments, activations, logits), less what it took before the
model was there; on a GPU it is what torch allocated. Speed is measured in one process, in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.training import bare_step, compare, time_steps
from modularforge.config import ModelConfig
from modularforge.experts.trainable import Tensors
from modularforge.model.backbone import Decoder, build_backbone, cross_entropy
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import default_device
from modularforge.training.meter import peak_memory_bytes

SEQUENCES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("vocabulary", 49152), ("tokens", 2048), ("width", 512), ("layers", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(memory(options))
        return
    whole, pieces = (int(in_a_process(name)) for name in LOSSES)
    print(
        f"memory: {whole / 2**20:.0f} MB whole, {pieces / 2**20:.0f} MB in pieces: {pieces / whole:.3f} (target <= 0.6)"
    )
    slow, fast = compare([steps(name, options) for name in LOSSES], options.rounds)
    print(f"speed:  {slow:.3f} s whole, {fast:.3f} s in pieces: {slow / fast:.3f} of the speed (target >= 1.0)")


def whole_loss(model: nn.Module, tensors: Tensors) -> Tensor:
    """As it was: all logits, in float32."""
    return cross_entropy(model(tensors["inputs"]), tensors["targets"])


LOSSES = {"whole": whole_loss, "pieces": TEXT.loss}


def in_a_process(name: str) -> str:
    """What this program prints for one of the losses alone."""
    command = [sys.executable, "-m", "benchmarks.head", "--only", name, *sys.argv[1:]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def memory(options: argparse.Namespace) -> int:
    """Bytes that two steps take at their peak."""
    before = peak_memory_bytes(default_device())
    step = steps(options.only, options)
    for _ in range(2):
        step()
    return peak_memory_bytes(default_device()) - before


def steps(name: str, options: argparse.Namespace) -> Callable[[], float]:
    """What takes one step and tells its seconds."""
    decoder, tokens_BT = case(options)
    step = bare_step(decoder, LOSSES[name])
    return lambda: time_steps(decoder, step, tokens_BT, 1)


def case(options: argparse.Namespace) -> tuple[Decoder, Tensor]:
    """A backbone, and a batch of it."""
    torch.manual_seed(0)
    context, width = options.tokens // SEQUENCES, options.width
    shape = ModelConfig(width=width, layers=options.layers, ffn_width=width * 8 // 3, context_length=context)
    tokens_BT = torch.randint(0, options.vocabulary, (SEQUENCES, context + 1), device=default_device())
    return build_backbone(shape, options.vocabulary).to(default_device()), tokens_BT


if __name__ == "__main__":
    main()
