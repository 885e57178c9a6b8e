"""Training on a GPU: types, kernels, the optimizer, processes, restarts, and that the host never waits in a step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import Trainable, trainable
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.moe import build_moe
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT, text_batches
from modularforge.training.distributed import World, parallelise
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import routed

pytestmark = pytest.mark.gpu

VOCABULARY, ROWS, STEPS = 128, 8, 12
SHAPE = ModelConfig(width=64, layers=2, heads=4, kv_heads=2, ffn_width=128, context_length=64)


@dataclass(frozen=True)
class Counting:
    """Rows that count upwards from a random token: learned in a few steps."""

    def batches(self, position: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        def rows() -> Iterator[tuple[Tensor, Tensor, int]]:
            place = position
            while True:
                first = torch.randint(0, VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(place))
                tokens = (first + torch.arange(SHAPE.context_length + 1)) % VOCABULARY
                place += 1
                yield tokens[:, :-1], tokens[:, 1:], place

        return text_batches(rows())


def model(build: Callable[[], Decoder] | None = None) -> Decoder:
    torch.manual_seed(0)
    return build() if build else build_backbone(SHAPE, VOCABULARY)


def trained(
    device: torch.device, what: Trainable | None = None, steps: int = STEPS, folder: Path | None = None, **settings: Any
) -> tuple[Trainable, float]:
    """What was trained, and its last loss."""
    what = what or trainable(model(), TEXT.loss)
    phase = PhaseConfig(steps=STEPS, batch_size=ROWS, warmup_steps=2, peak_learning_rate=1e-2)
    training = TrainingConfig(**{"log_every": 1, "validate_every": 10**6, "checkpoint_every": 10**6, **settings})
    url = str(folder) if folder else None
    job = Job("test", phase, training, fingerprint="f", checkpoint_url=url, until=steps, speaks=False)
    losses = fit(what, Counting(), job, lambda: 0.0, World(device=device))
    assert losses["train_loss"] is not None
    return what, losses["train_loss"]


def weights(what: Trainable) -> dict[str, Tensor]:
    return {name: weight.detach().cpu() for name, weight in what.parameters.items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_bf16_learns_as_fp32_does_and_weights_stay_float32(device: torch.device) -> None:
    what, exact = trained(device, precision="fp32")
    rounded_what, rounded = trained(device, precision="bf16")
    assert exact < 4.0  # 4.85 before the first step
    assert rounded == pytest.approx(exact, abs=0.15)
    assert {weight.dtype for weight in what.parameters.values()} == {torch.float32}
    assert {weight.dtype for weight in rounded_what.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("build", ["backbone", "mixture"])
def test_a_gpu_learns_what_a_cpu_learns(device: torch.device, build: str) -> None:
    def make() -> Trainable:
        if build == "backbone":
            return trainable(model(), TEXT.loss)
        return routed(model(lambda: build_moe(SHAPE, VOCABULARY, 4, 2)), TEXT.loss, 1e-3, 1e-2)

    _, here = trained(device, make(), precision="fp32")
    _, there = trained(torch.device("cpu"), make(), precision="fp32")
    assert here == pytest.approx(there, abs=2e-2)


def test_compiled_steps_are_those_of_plain_ones(device: torch.device) -> None:
    if device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler on a CPU")
    _, plain = trained(device, precision="fp32")
    _, compiled = trained(device, precision="fp32", compile=True)
    assert compiled == pytest.approx(plain, abs=1e-2)


def test_attention_is_there_as_flash_attention_in_bf16(device: torch.device) -> None:
    decoder = model().to(device)
    tokens = torch.arange(32, device=device)[None]

    def logits(kernel: SDPBackend) -> Tensor:
        with torch.no_grad(), sdpa_kernel(kernel), torch.autocast(device.type, torch.bfloat16):
            return decoder(tokens).float()

    assert (logits(SDPBackend.FLASH_ATTENTION) - logits(SDPBackend.MATH)).abs().max() < 0.05


def test_fused_adamw_steps_as_the_plain_one(device: torch.device) -> None:
    def stepped(is_fused: bool) -> dict[str, Tensor]:
        decoder = model().to(device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=is_fused, foreach=False)
        for step in range(3):
            tokens = torch.full((2, 8), step, device=device)
            decoder(tokens, targets_BT=tokens + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: weight.detach().cpu() for name, weight in decoder.named_parameters()}

    assert apart(stepped(True), stepped(False)) < 1e-4


@contextmanager
def one_rank(device: torch.device, folder: Path) -> Iterator[World]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        # As one of two for `parallelise`, which leaves a lonely process without DDP.
        yield World(0, 2, device)
    finally:
        dist.destroy_process_group()


def test_ddp_over_nccl_with_one_rank_has_the_gradients_of_the_bare_model(device: torch.device, tmp_path: Path) -> None:
    tokens = torch.arange(16, device=device).view(2, 8)

    def gradients(wrapped: nn.Module, decoder: Decoder) -> dict[str, Tensor]:
        wrapped(tokens, targets_BT=tokens + 1).backward()
        return {name: weight.grad.cpu() for name, weight in decoder.named_parameters() if weight.grad is not None}

    bare = model().to(device)
    alone = gradients(bare, bare)
    with one_rank(device, tmp_path) as world:
        decoder = model().to(device)
        together = gradients(parallelise(decoder, world), decoder)
    assert together.keys() == alone.keys()
    assert apart(together, alone) < 1e-5


@pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiled"])
def test_a_stopped_job_goes_on_bit_for_bit(device: torch.device, compiles: bool, tmp_path: Path) -> None:
    """Compiled, only if the same kernels are chosen again, without which it cannot be the default."""
    if compiles and device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler on a CPU")
    settings: dict[str, Any] = {"checkpoint_every": STEPS // 2, "compile": compiles}
    straight, _ = trained(device, **settings)
    trained(device, steps=STEPS // 2, folder=tmp_path, **settings)
    torch.compiler.reset()  # as a new process has nothing compiled
    resumed, _ = trained(device, folder=tmp_path, **settings)
    assert apart(weights(straight), weights(resumed)) == 0


def test_recomputed_blocks_give_the_same_bits(device: torch.device) -> None:
    kept, _ = trained(device, recompute="none")
    again, _ = trained(device, recompute="blocks")
    assert apart(weights(kept), weights(again)) == 0


def test_the_host_does_not_wait_for_the_gpu_within_a_step(device: torch.device) -> None:
    """Steps between reports: torch raises where one of them asks the GPU for a value."""
    modes = _Modes(device)
    plain = trainable(model(), TEXT.loss)
    watched = Trainable(plain.model, plain.loss, plain.groups, before_step=modes.before_step)
    with modes:
        trained(device, watched, precision="auto", log_every=STEPS)
    assert modes.watched_steps == STEPS - 3


class _Modes:
    """Lets torch raise where the host waits, from the second step to the last but one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.watched_steps = device, 0

    def before_step(self, step: int) -> None:
        is_watched = 2 <= step < STEPS - 1
        self.watched_steps += is_watched
        self._set("error" if is_watched else "default")

    def _set(self, mode: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    def __enter__(self) -> None:
        self.watched_steps = 0

    def __exit__(self, *_raised: object) -> None:
        self._set("default")
