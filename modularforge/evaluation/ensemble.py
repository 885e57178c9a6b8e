"""Output ensembles of experts from what each says of the next token: no logits are kept.

A mixture of experts' distributions gives the target the weighted sum of what they give it, so one number per expert
and token is enough. Weights are equal, or the posterior over experts given the tokens so far (DEMix, arXiv 2108.05036;
c-BTM, arXiv 2303.14177): the running product of their likelihoods within the window, all that the models read too.
"""

# K experts  R rows (windows)  T tokens of a window

from __future__ import annotations

import math

import torch
from torch import Tensor

from modularforge.data.loader import evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.evaluation.scoring import score_batch
from modularforge.model.backbone import Decoder


def target_log_probabilities(
    model: Decoder, tokens: Tokens, context_length: int, batch_size: int, max_tokens: int
) -> Tensor:
    """Log-probability of every target [R, T] in float32 on the CPU; zero where a window is padded."""
    model.eval()
    with torch.inference_mode():
        batches = evaluation_batches(tokens, context_length, batch_size, max_tokens)
        return torch.cat([score_batch(model, *batch) for batch in batches])


def uniform_ensemble(scores_KRT: Tensor) -> Tensor:
    """Log of the mean probability of each target, [R, T]."""
    return torch.logsumexp(scores_KRT, dim=0) - math.log(len(scores_KRT))


def posterior_ensemble(scores_KRT: Tensor) -> Tensor:
    """Log-probability of each target [R, T] when experts weigh by their likelihood of the window's earlier targets."""
    past_KRT = scores_KRT.cumsum(dim=2) - scores_KRT
    return torch.logsumexp(past_KRT.log_softmax(dim=0) + scores_KRT, dim=0)
