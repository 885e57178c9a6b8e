"""Blocks that are computed again in the backward pass: the same bits, less memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.trainable import trainable
from modularforge.model.adapter_config import AdapterShape
from modularforge.model.backbone import Decoder, build_backbone, cross_entropy
from modularforge.model.lora import add_adapters
from modularforge.model.moe import build_moe, observe_routing, router_z_loss
from modularforge.model.sizes import activation_bytes
from modularforge.tasks.task import Batch
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.recompute import choose_recompute

B, T, V, E = 2, 8, 31, 3
SHAPE = ModelConfig(width=24, layers=3, heads=4, kv_heads=2, ffn_width=40, context_length=T)


def dense() -> Decoder:
    return build_backbone(SHAPE, V)


def mixture() -> Decoder:
    return build_moe(SHAPE, V, E, 2)


def adapted() -> Decoder:
    model = build_backbone(SHAPE, V)
    add_adapters(model, AdapterShape(rank=2, alpha=4.0, dropout=0.3, modules=("q_proj", "up_proj"), rslora=False))
    return model


def gradients(build: Callable[[], Decoder], recomputes: bool, is_routed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, that of routers included, and its gradients."""
    torch.manual_seed(0)
    model = build().train()
    model.recomputes = recomputes
    observe_routing(model)
    tokens, targets = torch.randint(0, V, (2, B, T))
    routing = torch.randn(B, T, E) if is_routed else None
    torch.manual_seed(1)  # of dropout
    loss = cross_entropy(model(tokens, routing_BTE=routing), targets)
    if build is mixture and not is_routed:
        loss = loss + router_z_loss(model)
    loss.backward()
    return loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(
    ("build", "is_routed"),
    [(dense, False), (mixture, False), (mixture, True), (adapted, False)],
    ids=["dense", "mixture", "mixture routed by text", "adapters with dropout"],
)
def test_losses_and_gradients_are_the_same_bits(build: Callable[[], Decoder], is_routed: bool) -> None:
    kept, again = (gradients(build, recomputes, is_routed) for recomputes in (False, True))
    assert torch.equal(kept[0], again[0])
    assert kept[1].keys() == again[1].keys()
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def kept_bytes(model: Decoder) -> int:
    """What autograd keeps of a forward pass, each memory once, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.hidden(torch.randint(0, V, (4, 64)))
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_estimate_of_activations_is_what_autograd_keeps(recomputes: bool) -> None:
    shape = SHAPE.model_copy(update={"width": 64, "ffn_width": 160, "layers": 8, "context_length": 64})
    model = build_backbone(shape, V)
    model.recomputes = recomputes
    estimate = activation_bytes(shape, 4 * 64, 4, recomputes)
    one_block = (
        activation_bytes(shape, 4 * 64, 4) / shape.layers if recomputes else 0
    )  # there in the backward pass alone
    assert kept_bytes(model) == pytest.approx(estimate - one_block, rel=0.2)


@dataclass(frozen=True)
class Same:
    """One batch again and again."""

    def batches(self, position: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(5))
        for place in itertools.count(position + 1):
            yield Batch({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, place, B * T)


def test_a_job_has_the_same_losses_with_and_without() -> None:
    losses = []
    for recompute in ("none", "blocks"):
        torch.manual_seed(0)
        model = dense()
        job = Job("job", PhaseConfig(steps=4, warmup_steps=1), TrainingConfig(recompute=recompute))
        losses.append(fit(trainable(model, TEXT.loss), Same(), job, lambda: 0.0, World())["train_loss"])
        assert model.recomputes == (recompute == "blocks")
    assert losses[0] == losses[1]


def test_auto_recomputes_on_a_gpu_that_would_be_full_and_never_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("job", PhaseConfig(), TrainingConfig(recompute="auto"), tokens=2 * 4096)
    model = dense()
    learns = trainable(model, TEXT.loss)
    choose_recompute(learns, job, World())
    assert not model.recomputes
    for memory, ranks, expected in ((2**20, 2, True), (2**40, 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, memory=memory: (0, memory))
        choose_recompute(learns, job, World(0, ranks, torch.device("cuda", 0)))
        assert model.recomputes == expected
