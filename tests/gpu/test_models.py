"""Statistics, a whole run with its assembly, and generation on a GPU, beside the same on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modularforge.config import ModelConfig
from modularforge.evaluation.generation import (
    Sampling,
    captured,
    continue_batch,
    continue_fixed,
    continue_tokens,
)
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.folder import load_model
from modularforge.model.moe import build_moe, restrict_routing
from modularforge.routing.gathering import gather_statistics
from modularforge.run import Run
from tests.conftest import run_every_stage, tiny_config

pytestmark = pytest.mark.gpu

VOCABULARY = 97
SHAPE = ModelConfig(width=48, layers=2, heads=4, kv_heads=2, ffn_width=96, context_length=48)
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)


def model(experts: int = 1) -> Decoder:
    torch.manual_seed(0)
    built = build_backbone(SHAPE, VOCABULARY) if experts == 1 else build_moe(SHAPE, VOCABULARY, experts, 2)
    for weight in built.parameters():  # far from the ties of small weights
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return built.eval()


def tokens(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, SHAPE.context_length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", [1, 4])
def test_logits_of_a_gpu_are_those_of_a_cpu(device: torch.device, experts: int) -> None:
    with torch.inference_mode():
        there, here = model(experts)(tokens()), model(experts).to(device)(tokens().to(device)).cpu()
    torch.testing.assert_close(here, there, atol=2e-3, rtol=1e-3)


def test_routing_can_be_restricted_on_a_gpu(device: torch.device) -> None:
    mixture = model(4).to(device)
    restrict_routing(mixture, [1, 3])
    with torch.inference_mode():
        some = mixture(tokens().to(device)).cpu()
        there = model(4)
        restrict_routing(there, [1, 3])
        torch.testing.assert_close(some, there(tokens()), atol=2e-3, rtol=1e-3)


def test_statistics_of_a_gpu_are_those_of_a_cpu(device: torch.device) -> None:
    here, there = (gather_statistics(model(), [tokens(), tokens(2)], place) for place in (device, CPU))
    for mine, other in zip(here.layers, there.layers, strict=True):
        assert mine.count == other.count == 6 * SHAPE.context_length
        np.testing.assert_allclose(mine.sum_D, other.sum_D, atol=1e-2)
        np.testing.assert_allclose(mine.outer_DD, other.outer_DD, rtol=1e-3, atol=1e-1)
    np.testing.assert_allclose(here.inverse_rms_L, there.inverse_rms_L, rtol=1e-4)


def test_a_whole_run_ends_well_and_its_experts_help(device: torch.device, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", backbone={"steps": 40}, experts={"steps": 40})
    losses = {row: values["mean_loss"] for row, values in run_every_stage(config)["models"].items()}
    assert losses["oracle"] < losses["backbone"]
    assembled = load_model(Run(config).require("assemble").local_folder()).to(device)
    with torch.inference_mode():
        assert torch.isfinite(assembled(torch.zeros(1, 8, dtype=torch.long, device=device))).all()


@pytest.mark.parametrize("experts", [1, 4])
def test_greedy_tokens_are_those_of_a_cpu_alone_and_in_a_batch(device: torch.device, experts: int) -> None:
    prompts = [[5, 9, 2], [7, 1, 1, 8, 30, 4], [3]]
    expected = [continue_tokens(model(experts), ids, 16, GREEDY, ()) for ids in prompts]
    here = model(experts).to(device)
    assert [continue_tokens(here, ids, 16, GREEDY, ()) for ids in prompts] == expected
    assert continue_batch(here, prompts, 16, GREEDY, ()) == expected


def test_captured_steps_give_the_tokens_of_plain_ones(device: torch.device) -> None:
    prompts, here = [[5, 9, 2], [7, 1, 1, 8, 30, 4], [3]], model().to(device)
    expected = continue_batch(here, prompts, 16, GREEDY, ())
    step = captured(here) if device.type == "cuda" else here.fixed_logits
    for _ in range(2):  # the second with a cache and a graph of its own
        assert continue_fixed(here, prompts, 16, (), step) == expected
