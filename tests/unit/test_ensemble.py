"""Output ensembles against a naive computation with whole distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modularforge.config import ModelConfig
from modularforge.data.loader import evaluation_batches
from modularforge.evaluation.scoring import posterior_ensemble, score_batch, uniform_ensemble
from modularforge.model.backbone import Decoder, build_backbone

K, V, T = 3, 17, 8
SHAPE = ModelConfig(width=8, layers=1, heads=2, kv_heads=1, ffn_width=12, context_length=T)
TOKENS = np.random.default_rng(0).integers(0, V, 3 * T + 4)


@pytest.fixture(scope="module")
def models() -> list[Decoder]:
    torch.manual_seed(0)
    built = [build_backbone(SHAPE, V) for _ in range(K)]
    with torch.no_grad():
        for model in built:
            model.lm_head.weight.mul_(40)  # far from uniform, so that the experts differ
    return built


def naive(models: list[Decoder], weights_of: object) -> list[float]:
    """Log-probability of each target, one window and position after another."""
    found = []
    for inputs_BT, targets_BT in evaluation_batches(TOKENS, T, 1):
        probabilities = [model(inputs_BT)[0].softmax(-1) for model in models]
        weights = [1 / K] * K
        for t, target in enumerate(targets_BT[0].tolist()):
            if target < 0:
                break
            given = [float(probability[t, target]) for probability in probabilities]
            found.append(float(np.log(sum(w * p for w, p in zip(weights, given, strict=True)))))
            if weights_of == "posterior":
                weights = [w * p for w, p in zip(weights, given, strict=True)]
                weights = [w / sum(weights) for w in weights]
    return found


def scores(models: list[Decoder]) -> tuple[Tensor, Tensor]:
    kept = torch.cat([targets >= 0 for _, targets in evaluation_batches(TOKENS, T, 2)])
    with torch.no_grad():
        each = [[score_batch(model, *batch) for batch in evaluation_batches(TOKENS, T, 2)] for model in models]
    return torch.stack([torch.cat(found) for found in each]), kept


@pytest.mark.parametrize(("ensemble", "weights"), [(uniform_ensemble, "uniform"), (posterior_ensemble, "posterior")])
def test_an_ensemble_equals_the_mixture_of_whole_distributions(
    models: list[Decoder], ensemble: object, weights: str
) -> None:
    scores_KRT, kept_RT = scores(models)
    with torch.no_grad():
        expected = naive(models, weights)
    assert len(expected) == len(TOKENS) - 1
    torch.testing.assert_close(ensemble(scores_KRT)[kept_RT], torch.tensor(expected), atol=1e-5, rtol=0)  # type: ignore[operator]


def test_the_posterior_does_not_know_the_token_that_it_predicts(models: list[Decoder]) -> None:
    scores_KRT, _ = scores(models)
    changed = scores_KRT.clone()
    changed[0, :, 3] += 5.0
    before, after = posterior_ensemble(scores_KRT), posterior_ensemble(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    expected = (scores_KRT.cumsum(2) - scores_KRT).log_softmax(0)[:, :, 3] + changed[:, :, 3]
    torch.testing.assert_close(after[:, 3], expected.logsumexp(0))


def test_an_ensemble_of_one_model_is_that_model(models: list[Decoder]) -> None:
    scores_KRT, kept_RT = scores(models[:1])
    for ensemble in (uniform_ensemble, posterior_ensemble):
        torch.testing.assert_close(ensemble(scores_KRT)[kept_RT], scores_KRT[0][kept_RT])
