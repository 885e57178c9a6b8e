"""The head's loss in pieces is the loss of all logits at once, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modularforge.config import ModelConfig
from modularforge.evaluation.scoring import score_batch, summed_loss
from modularforge.model import head
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.head import Reduction, head_loss
from modularforge.tasks.instruction import INSTRUCTION
from modularforge.tasks.text import TEXT

B, T, D, V = 2, 9, 8, 31
SHAPE = ModelConfig(width=D, layers=1, heads=2, kv_heads=1, ffn_width=12, context_length=T)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of the logits at a time, the last piece of two."""
    monkeypatch.setattr(head, "MOST_LOGITS", 0)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 4 * V + 1})


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """States, the head's matrix and targets, of which some count for nothing."""
    torch.manual_seed(0)
    targets_BT = torch.randint(0, V, (B, T))
    targets_BT[0, :3] = targets_BT[1, 5] = -100
    return torch.randn(B, T, D), torch.randn(V, D), targets_BT


def gradients(reduction: Reduction, learns: str, is_plain: bool = False) -> list[Tensor | None]:
    """The loss, and the gradients of three times the loss."""
    x, weight, targets = inputs()
    x.requires_grad_("x" in learns)
    weight.requires_grad_("w" in learns)
    loss = plain(x, weight, targets, reduction) if is_plain else head_loss(x, weight, targets, reduction)
    (3 * loss).backward()
    return [loss.detach(), x.grad, weight.grad]


def plain(x: Tensor, weight: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("learns", ["xw", "x", "w"])
@pytest.mark.usefixtures("in_pieces")
def test_loss_and_gradients_in_pieces_are_those_of_all_logits(reduction: Reduction, learns: str) -> None:
    found, expected = gradients(reduction, learns), gradients(reduction, learns, is_plain=True)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("in_pieces")
def test_the_loss_of_each_target_in_pieces_is_that_of_all_logits() -> None:
    x, weight, targets = inputs()
    torch.testing.assert_close(head_loss(x, weight, targets, "none").flatten(), plain(x, weight, targets, "none"))


@pytest.mark.usefixtures("in_pieces")
def test_pieces_under_autocast_are_of_bfloat16_and_give_gradients_of_the_parameters_type() -> None:
    x, weight, targets = inputs()
    weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(x, weight, targets)
    loss.backward()
    assert (loss.dtype, weight.grad is not None and weight.grad.dtype) == (torch.float32, torch.float32)
    exact = gradients("mean", "w", is_plain=True)
    assert loss.detach() == pytest.approx(float(exact[0]), rel=1e-2)  # type: ignore[arg-type]
    assert float(loss) != float(exact[0])  # type: ignore[arg-type]
    assert (3 * weight.grad - exact[2]).abs().max() < 0.02 * exact[2].abs().max()  # type: ignore[operator, union-attr]


def test_small_logits_have_the_bits_that_they_always_had() -> None:
    x, weight, targets = inputs()
    for reduction in ("mean", "sum"):
        assert torch.equal(head_loss(x, weight, targets, reduction), plain(x, weight, targets, reduction))
    each_BVT = F.linear(x, weight).transpose(1, 2)
    assert torch.equal(head_loss(x, weight, targets, "none"), F.cross_entropy(each_BVT, targets, reduction="none"))


def everything(model: Decoder) -> list[Tensor]:
    """Losses of tasks, validation and evaluation, and a gradient."""
    _, _, targets = inputs()
    tokens, examples = targets.clamp_min(0), torch.zeros(B, T, dtype=torch.long)
    named = {"inputs": tokens, "targets": targets, "examples": examples, "row_targets": torch.ones(B)}
    losses = [TEXT.loss(model, named), INSTRUCTION.loss(model, named)]
    model.zero_grad()
    sum(losses).backward()  # type: ignore[union-attr]
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    summed = summed_loss(model, [(tokens, targets)], torch.device("cpu"))
    return [*losses, gradient, torch.tensor(summed[0]), score_batch(model, tokens, targets)]


def test_all_that_takes_a_loss_takes_it_in_pieces_where_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_backbone(SHAPE, V)
    at_once, widest = everything(model), []
    monkeypatch.setattr(head, "MOST_LOGITS", 0)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 3 * V})
    linear = F.linear

    def watched(x: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
        widest.append(x.numel() // D if len(weight) == V else 0)
        return linear(x, weight, *more)

    monkeypatch.setattr(F, "linear", watched)
    for one, other in zip(everything(model), at_once, strict=True):
        torch.testing.assert_close(one, other)
    assert max(widest) == 3


def test_a_compiled_model_takes_its_loss_in_pieces(in_pieces: None) -> None:
    torch.manual_seed(0)
    model = build_backbone(SHAPE, V)
    _, _, targets = inputs()
    named = {"inputs": targets.clamp_min(0), "targets": targets}
    compiled: nn.Module = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    losses = [TEXT.loss(each, named) for each in (model, compiled)]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert model.lm_head.weight.grad is not None
