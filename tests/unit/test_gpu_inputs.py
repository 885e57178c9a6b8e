"""What a GPU is given: the type in which models are measured, and batches ahead of their time. No GPU is needed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch

from benchmarks.gpu.grouped import use_grouped
from modularforge.config import ModelConfig, TrainingConfig
from modularforge.model.backbone import build_backbone
from modularforge.model.moe import build_moe
from modularforge.routing.gathering import gather_statistics
from modularforge.tasks.task import Batch
from modularforge.training import ahead
from modularforge.training.precision import measuring

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("precision", "expected"), [("bf16", True), ("auto", True), ("fp32", False)], ids=["bf16", "auto", "fp32"]
)
def test_a_gpu_measures_in_the_type_it_trains_in(
    precision: Literal["bf16", "auto", "fp32"], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.dtype]] = []

    @contextmanager
    def recorded(device: str, dtype: torch.dtype) -> Iterator[object]:
        asked.append((device, dtype))
        yield asked

    monkeypatch.setattr(torch, "autocast", recorded)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    before = torch.backends.cuda.matmul.allow_tf32
    with measuring(TrainingConfig(precision=precision), GPU):
        assert torch.backends.cuda.matmul.allow_tf32 == expected
    assert asked == [("cuda", torch.bfloat16)] * expected
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_a_cpu_measures_in_float32_whatever_it_trains_in() -> None:
    with measuring(TrainingConfig(precision="bf16"), CPU):
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_statistics_under_autocast_are_summed_in_float32() -> None:
    shape = ModelConfig(width=24, layers=1, heads=4, kv_heads=2, ffn_width=40, context_length=8)
    torch.manual_seed(0)
    model, tokens = build_backbone(shape, 31), [torch.randint(0, 31, (4, 8))]
    exact = gather_statistics(model, tokens, CPU).layers[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = gather_statistics(model, tokens, CPU).layers[0]
    assert abs(found.outer_DD - exact.outer_DD).max() < 0.02 * abs(exact.outer_DD).max()
    assert (torch.tensor(found.outer_DD).bfloat16().double() != torch.tensor(found.outer_DD)).any()


def numbered(start: int) -> Iterator[Batch]:
    for place in itertools.count(start):
        yield Batch({"x": torch.tensor([place])}, place + 1, 1.0)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_batches_ahead_are_the_same_in_the_same_order_and_the_last_taken_says_where_to_go_on(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []

    def pin(batch: Batch) -> Batch:
        pinned.append(int(batch.tensors["x"]))
        return batch

    monkeypatch.setattr(ahead, "_pinned", pin)
    threads = threading.active_count()
    with ahead.built_ahead(numbered(4), device) as batches:
        taken: list[Any] = [next(batches) for _ in range(5)]
        assert threading.active_count() == threads + (device is GPU)
    assert threading.active_count() == threads  # the thread ends, and with it what it made ahead
    assert [int(batch.tensors["x"]) for batch in taken] == [4, 5, 6, 7, 8]
    assert pinned[:5] == [4, 5, 6, 7, 8] * (device is GPU)
    with ahead.built_ahead(numbered(taken[-1].position), device) as batches:
        assert int(next(batches).tensors["x"]) == 9


def test_grouped_products_are_the_sorted_visits_in_value_and_gradient() -> None:
    """What the GPU's proof times beside them."""
    shape = ModelConfig(width=24, layers=2, heads=4, kv_heads=2, ffn_width=40, context_length=8)
    tokens, found = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(1)), []
    for use in (lambda model: model, use_grouped):
        torch.manual_seed(0)
        model = use(build_moe(shape, 31, 5, 2))
        loss = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (other, others) = found
    assert torch.allclose(loss, other, atol=1e-6)
    assert gradients.keys() <= others.keys()
    assert all(torch.allclose(gradient, others[name], atol=1e-6) for name, gradient in gradients.items())
    assert not any(bool(others[name].any()) for name in others.keys() - gradients.keys())  # of what nothing visits
