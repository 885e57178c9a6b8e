"""Peak memory of a training step on each rank, by `training.parallel` and number of ranks, beside its arithmetic.

    python benchmarks/sharding.py [--layouts ddp:1 ddp:2 fsdp:2 fsdp:4 hsdp:4] [--width 512] [--layers 8] [--calibrates]

With `--calibrates` it is a mixture of which gains and router rows learn, and all else stays in bf16.

What lies in pieces should fall as 1 / ranks; all of it should be what `modularforge info --gpus` says (`memory.py`).
Measured is what a rank takes at its peak in steps after the first, and while its weights are made, on the host, less
what it took before the model was there: on
a GPU what torch allocated, on a CPU the resident set, to which threads and gloo's buffers add. In bf16, as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.experts.trainable import Trainable, trainable
from modularforge.memory import Memory, job_memory
from modularforge.model import names
from modularforge.model.backbone import shaped_backbone
from modularforge.model.deferred import drawn
from modularforge.model.moe import build_moe
from modularforge.model.shards import own_piece
from modularforge.pipeline import STAGES
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import World, joined_world, parallelise
from modularforge.training.optimizer import build_optimizer
from modularforge.training.precision import autocast
from modularforge.training.sharding import shard

VOCABULARY, CONTEXT, SEQUENCES, STEPS, EXPERTS = 4096, 64, 8, 3, 6
SMALL = {"width": 16, "layers": 1, "ffn_width": 16}
LAYOUTS = ("ddp:1", "ddp:2", "fsdp:2", "fsdp:4", "hsdp:4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    for name, value in (("width", 512), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--calibrates", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        with joined_world() as world:
            found = json.dumps(measured(config_of(options, options.only), options.calibrates, world))
            sys.stdout.write(f"{found}\n")  # at once: print would let another rank's line in before the end of its own
        return
    print("layout   in pieces, MB  of one 1/shards  peak, MB arithmetic  ratio  made, MB")
    one = 0.0
    for layout in options.layouts:
        parallel, _, ranks = layout.partition(":")
        config = config_of(options, parallel)
        held, peak, made = (max(values) for values in zip(*in_ranks(parallel, int(ranks)), strict=True))
        arithmetic, one = expected(config, options.calibrates, int(ranks)), one or held
        shards = 1 if parallel == "ddp" else 2 if parallel == "hsdp" else int(ranks)
        print(
            f"{layout:<8} {held / 1e6:>13.1f} {held / one:>7.3f} {1 / shards:>8.3f} {peak / 1e6:>9.0f} "
            f"{arithmetic.total / 1e6:>10.0f} {peak / arithmetic.total:>6.2f} {made / 1e6:>9.0f}"
        )


def config_of(options: argparse.Namespace, parallel: str) -> Config:
    """Settings of the model that is trained."""
    width = options.width
    values = {"width": width, "layers": options.layers, "heads": 8, "kv_heads": 8, "ffn_width": 4 * width}
    settings = {f"model.{name}": value for name, value in values.items()} | {"model.context_length": CONTEXT}
    settings |= {"data.vocab_size": VOCABULARY, "backbone.batch_size": SEQUENCES, "backbone.accumulation_steps": 1}
    settings |= {"calibration.batch_size": SEQUENCES, "experts.count": EXPERTS - 1, "assembly.router": "means"}
    settings |= {"experts.anchored": True, "training.parallel": parallel, "training.precision": "bf16"}
    settings |= {"training.shard_ranks": 2} if parallel == "hsdp" else {}
    return load_config(str(Path(__file__).parents[1] / "configs/default.yaml"), list(settings.items()))


def expected(config: Config, calibrates: bool, ranks: int) -> Memory:
    """By arithmetic, on one rank; a model that is calibrated is stored in bf16, as pretrained ones are."""
    pretrained = config.model.model_copy(update={"pretrained": "given" if calibrates else None})
    config, stage = config.model_copy(update={"model": pretrained}), "calibrate" if calibrates else "backbone"
    return job_memory(config, STAGES[stage], ranks, config.training.parallel, config.training.shard_ranks)


def in_ranks(parallel: str, ranks: int) -> list[tuple[float, ...]]:
    """What each rank has measured, in processes of their own."""
    run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    options = [argument for argument in sys.argv[1:] if argument.startswith(("--w", "--c")) or argument.isdecimal()]
    command = [sys.executable, "-m", *run, "benchmarks.sharding", "--only", parallel, *options]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
    return [tuple(row) for row in map(json.loads, done.stdout.splitlines())]


def learning(config: Config, calibrates: bool) -> Trainable:
    """What is trained."""
    if not calibrates:
        begun = drawn(partial(shaped_backbone, config.model, VOCABULARY), config.model.layers)
        return trainable(begun.model, TEXT.loss, weights=begun.weights)
    with torch.device("meta"):
        empty = build_moe(config.model, VOCABULARY, EXPERTS, 2).bfloat16()
    model = empty.to_empty(device="cpu").requires_grad_(False)
    model.restore_positions()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.02)
        weight.requires_grad_(names.is_gate(name) or names.shared_part(name) == "norms")
    model.has_half_blocks = model.has_float_stream = True
    return trainable(model, TEXT.loss)


def measured(config: Config, calibrates: bool, world: World) -> tuple[float, float, float]:
    """Bytes of weights, gradients and moments that this rank holds, and its peaks in a step and while weights are made.

    Those of a small model are made before, so that what torch imports for it is not counted.
    """
    torch.manual_seed(0)
    small = config.model_copy(update={"model": config.model.model_copy(update=SMALL)})
    shard(learning(small, calibrates), config.training, world)
    before = resident("VmRSS")
    forget_peak(torch.device("cpu"))
    learns = shard(learning(config, calibrates), config.training, world)
    made = float(resident("VmHWM") - before)
    learns.model.to(world.device)
    model = learns.model if config.training.parallel != "ddp" else parallelise(learns.model, world)
    optimizer = build_optimizer(learns.groups, config.backbone, config.training)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES // world.size, CONTEXT), device=world.device)
    peak, held = 0.0, 0
    for step in range(STEPS):
        if step:
            forget_peak(world.device)
        with autocast(config.training, world.device):
            learns.loss(model, {"inputs": tokens, "targets": tokens}).backward()
        tensors = [*learns.model.parameters(), *(w.grad for w in learns.parameters.values() if w.grad is not None)]
        optimizer.step()
        tensors += [value for state in optimizer.state.values() for value in state.values()]
        held = sum(own_piece(tensor).nbytes for tensor in tensors)
        peak = max(peak, peak_of(world.device, before)) if step else 0.0
        optimizer.zero_grad(set_to_none=True)
    return float(held), peak, made


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def forget_peak(device: torch.device) -> None:
    """Begin a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(device: torch.device, before: int) -> float:
    """Of the peak since then, what came after the start."""
    return float(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before)


if __name__ == "__main__":
    main()
