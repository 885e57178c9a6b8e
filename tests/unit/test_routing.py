"""Routers solved from sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modularforge.config import ModelConfig
from modularforge.errors import MismatchError
from modularforge.model.backbone import build_backbone
from modularforge.routing.gathering import gather_statistics
from modularforge.routing.solvers import equalised, means, random, ridge, uniform, with_public
from modularforge.routing.statistics import LayerStatistics, load_statistics, save_statistics

EXPERTS, WIDTH = 3, 6


def groups(seed: int = 0) -> list[np.ndarray]:
    """Inputs [N, D] of three partitions around centres of their own, of unequal sizes."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(EXPERTS, WIDTH)) * 2
    return [centre + random.normal(size=(400 + 300 * index, WIDTH)) for index, centre in enumerate(centres)]


def sums(inputs: np.ndarray) -> LayerStatistics:
    return LayerStatistics(float(len(inputs)), inputs.sum(axis=0), inputs.T @ inputs)


def test_ridge_from_sums_equals_scikit_learn_on_the_data() -> None:
    from sklearn.linear_model import Ridge

    data = groups()
    rows = ridge([sums(inputs) for inputs in data], penalty=0.05, temperature=1.0)
    x = np.concatenate(data)
    y = np.concatenate([np.tile(np.eye(EXPERTS)[index] - 1 / EXPERTS, (len(d), 1)) for index, d in enumerate(data)])
    weight = np.concatenate([np.full(len(d), 1 / len(d) / EXPERTS) for d in data])
    scale = np.trace(sum(d.T @ d / len(d) for d in data) / EXPERTS) / WIDTH
    reference = Ridge(alpha=0.05 * scale, fit_intercept=False).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(rows, reference.coef_, rtol=1e-6, atol=1e-9)


def test_an_intercept_folded_into_the_rows_changes_nothing() -> None:
    data = groups()
    mean = np.mean([inputs.mean(axis=0) for inputs in data], axis=0)
    second = np.mean([inputs.T @ inputs / len(inputs) for inputs in data], axis=0)
    second += 0.05 * np.trace(second) / WIDTH * np.eye(WIDTH)
    target = np.stack([inputs.mean(axis=0) - mean for inputs in data]) / EXPERTS
    about_mean = np.linalg.solve(second - np.outer(mean, mean), target.T).T
    intercept, ones = -about_mean @ mean, np.linalg.solve(second, mean)
    rows = ridge([sums(inputs) for inputs in data], penalty=0.05, temperature=1.0)
    np.testing.assert_allclose(rows, about_mean + np.outer(intercept, ones), rtol=1e-9, atol=1e-12)


def test_equalised_rows_have_one_length_and_their_directions() -> None:
    rows = np.asarray([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(equalised(rows), [[1.2, 1.6], [0.0, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize("solve", [lambda s: ridge(s, 0.01, 0.1), lambda s: means(s, 0.1)])
def test_solved_rows_send_inputs_to_the_expert_of_their_partition(solve) -> None:
    rows = solve([sums(inputs) for inputs in groups()])
    assert rows.shape == (EXPERTS, WIDTH)
    hits = [np.mean((inputs @ rows.T).argmax(axis=1) == index) for index, inputs in enumerate(groups())]
    assert np.mean(hits) > 0.8
    assert min(hits) > 1 / EXPERTS


def test_sums_of_halves_add_up_to_the_same_router() -> None:
    whole = [sums(inputs) for inputs in groups()]
    halves = []
    for inputs in groups():
        first, second = sums(inputs[:100]), sums(inputs[100:])
        total = (first.count + second.count, first.sum_D + second.sum_D, first.outer_DD + second.outer_DD)
        halves.append(LayerStatistics(*total))
    np.testing.assert_allclose(ridge(whole, 0.01, 1.0), ridge(halves, 0.01, 1.0))


def test_the_public_row_is_zero_and_first() -> None:
    rows = with_public(np.ones((2, WIDTH)), True)
    assert rows.shape == (3, WIDTH)
    assert not rows[0].any()
    assert with_public(np.ones((2, WIDTH)), False).shape == (2, WIDTH)


def test_random_rows_follow_the_seed_and_uniform_rows_are_zero() -> None:
    assert np.array_equal(random(4, WIDTH, 1), random(4, WIDTH, 1))
    assert not np.array_equal(random(4, WIDTH, 1), random(4, WIDTH, 2))
    assert not uniform(4, WIDTH).any()


def test_gathered_statistics_are_the_sums_of_what_the_ffn_reads(tmp_path: Path) -> None:
    config = ModelConfig(width=24, layers=2, heads=4, kv_heads=2, ffn_width=40, context_length=8)
    model = build_backbone(config, 31).eval()
    batches = [torch.randint(0, 31, (3, 8)) for _ in range(2)]
    seen: list[torch.Tensor] = []
    handle = model.blocks[1].ffn.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].detach()))
    residual: list[torch.Tensor] = []
    norm = model.blocks[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda _m, arguments: residual.append(arguments[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    x = torch.cat(seen).reshape(-1, 24).double().numpy()
    streams = torch.cat(residual).reshape(-1, 24).double()
    save_statistics(tmp_path / "statistics.safetensors", gather_statistics(model, batches, torch.device("cpu")))
    statistics = load_statistics(tmp_path / "statistics.safetensors")
    found = statistics.layers[1]
    assert found.count == 48
    np.testing.assert_allclose(found.sum_D, x.sum(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.outer_DD, x.T @ x, rtol=1e-4, atol=1e-3)
    rms = (streams[:48].square().mean(dim=1) + config.norm_epsilon).sqrt()
    assert statistics.inverse_rms_L[1] == pytest.approx(float((1 / rms).mean()), rel=1e-4)
    assert np.array_equal(statistics.tokens_V, np.bincount(torch.cat(batches).flatten(), minlength=31))
    few = gather_statistics(model, batches, torch.device("cpu"), moments=False)
    save_statistics(tmp_path / "few.safetensors", few)
    sums = load_statistics(tmp_path / "few.safetensors")
    assert all(np.array_equal(a.sum_D, b.sum_D) for a, b in zip(sums.layers, statistics.layers, strict=True))
    assert np.array_equal(sums.inverse_rms_L, statistics.inverse_rms_L)
    assert (tmp_path / "few.safetensors").stat().st_size < 24 * 24 * 4
    with pytest.raises(MismatchError, match="train it again with experts"):
        ridge([*statistics.layers, *sums.layers], 0.1, 1.0)
