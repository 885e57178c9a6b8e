"""The machine: python and torch, each GPU against the CPU, and the network when torchrun started several processes.

`python -m modularforge.sanity.node` under torchrun checks all nodes of a job at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

from modularforge.sanity.checks import SanityError, perform
from modularforge.training.distributed import World, joined_world

SIZE = 512
TOLERANCE = 2e-2  # TF32, in which GPUs may multiply, keeps ten bits; a broken one is off by far more


def describe_node() -> Iterator[str]:
    """Versions and cores, and a matrix product on every GPU compared with the CPU's; raises SanityError."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"python {sys.version.split()[0]}, torch {torch.__version__}, {cores} cores"
    if not torch.cuda.is_available():
        yield "no GPU that torch can use; everything runs on the CPU"
    for index in range(torch.cuda.device_count()):
        yield _check_gpu(index)


def check_network(world: World) -> Iterator[str]:
    """Sum over all processes, which must reach each other (called on every rank); raises SanityError."""
    expected = world.size * (world.size - 1) / 2
    found = world.total([float(world.rank), 1.0])
    if found != [expected, float(world.size)]:
        raise SanityError(
            f"{world.size} processes must sum their ranks to {expected:g}, but got {found[0]:g}; check the network "
            "interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        )
    yield f"{world.size} processes reach each other over {'nccl' if world.device.type == 'cuda' else 'gloo'}"


def _check_gpu(index: int) -> str:
    """A sentence about one GPU."""
    device = torch.device("cuda", index)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    wrong = float(((left.to(device) @ right.to(device)).cpu() - left @ right).abs().max() / SIZE**0.5)
    if not wrong < TOLERANCE:
        raise SanityError(f"GPU {index} must multiply as the CPU does, but is off by {wrong:.3g}; use another node")
    facts = torch.cuda.get_device_properties(index)
    bf16 = "with" if torch.cuda.is_bf16_supported() else "without"
    return f"GPU {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16} bf16, multiplies right"


def main() -> int:
    """Check this node, and the network to the others of the job; 0 or 1."""
    with joined_world() as world:
        speak = print if world.is_main else (lambda _: None)
        outcomes = [perform(f"Node {os.uname().nodename}", describe_node, print)]
        if world.size > 1:
            outcomes.append(perform("Network", lambda: check_network(world), speak))
    return int(any(outcome.cause for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
