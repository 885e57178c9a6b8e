"""What a token, or a pair of tokens, says about the partition that a text is from, solved from counts alone.

The evidence for an expert is log p(token | previous token, its partition) less the same of the background, which is
what the backbone was trained on: naive Bayes with counts of pairs, backed off to counts of tokens. It is kept as a sum,

    evidence(token after previous) = token[token] + context[previous] + pair[previous, token],

where the last part is not zero only for pairs that were counted: a pair that no partition has costs nothing.
"""

# V vocabulary  E experts  P pairs

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modularforge.assembly.routing import Array
from modularforge.assembly.text_counts import TextCounts

SMOOTHING_TOKENS = 1000.0  # each partition's counts are mixed with so many tokens of the background
BACKOFF_TOKENS = 20.0  # and what follows a token with so many tokens of the partition's own
ROWS_AT_ONCE = 1 << 16

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TextEvidence:
    """Evidence in nats for each expert against the background, whose own is zero.

    `token_VE` alone is the evidence of a token whose predecessor is not known.
    """

    token_VE: Floats
    context_VE: Floats
    keys_P: NDArray[np.int64]
    pair_PE: NDArray[np.float16]


def token_evidence(
    counts: Sequence[TextCounts], background: TextCounts | None = None, neutral: Collection[int] = ()
) -> Array:
    """Evidence [V, E] of each token; `neutral` ones, such as special tokens, have none.

    Without a `background` it is the mean of all partitions.
    """
    background_V = background_of(counts, background)
    evidence_VE = np.stack([np.log(_smoothed(item, background_V)) for item in counts], axis=1)
    evidence_VE -= np.log(background_V)[:, None]
    evidence_VE[list(neutral)] = 0.0
    found: Array = evidence_VE
    return found


def background_of(counts: Sequence[TextCounts], background: TextCounts | None) -> Array:
    """Share of each token [V] in the background, or in all partitions alike; none is zero."""
    texts = [background] if background is not None and background.tokens_V.sum() > 0 else counts
    share_V = np.mean([item.tokens_V / max(1.0, item.tokens_V.sum()) for item in texts], axis=0)
    # As if each token of the vocabulary had occurred once in a million.
    share_V = share_V + 1e-6
    found_V: Array = share_V / share_V.sum()
    return found_V


def pair_evidence(
    counts: Sequence[TextCounts], background: TextCounts | None, neutral: Collection[int], most_pairs: int
) -> TextEvidence:
    """The evidence of tokens and of the `most_pairs` most telling pairs.

    A pair tells the more, the more often it occurs and the more the partitions differ in it.
    """
    background_V = background_of(counts, background)
    texts = [background] if background is not None and background.has_pairs else counts
    token_VE = token_evidence(counts, background, neutral)
    keys_P = np.unique(np.concatenate([item.keys_P for item in (*counts, *texts)]))
    keys_P = keys_P[~np.isin(keys_P // len(background_V), list(neutral))]
    # What follows a token in the background: the mean of the texts, as shares, so that all weigh alike.
    weights = [1e6 / max(1.0, item.tokens_V.sum()) / len(texts) for item in texts]
    after_V = sum(_followers(item) * weight for item, weight in zip(texts, weights, strict=True))
    pair_P = sum(_at(item, keys_P) * weight for item, weight in zip(texts, weights, strict=True))
    context_V = _context(np.asarray(after_V))
    context_VE = np.stack([_context(_followers(item)) for item in counts], axis=1) - context_V[:, None]
    context_VE[list(neutral)] = 0.0
    background_P = _gain(np.asarray(pair_P), background_V, keys_P)
    rows_PE = np.empty((len(keys_P), len(counts)), np.float16)
    telling_P = np.zeros(len(keys_P))
    shares = [_smoothed(item, background_V) for item in counts]
    for column, (item, share_V) in enumerate(zip(counts, shares, strict=True)):
        often_P = _at(item, keys_P)
        gain_P = _gain(often_P, share_V, keys_P) - background_P
        rows_PE[:, column] = gain_P
        telling_P += often_P / max(1.0, item.tokens_V.sum()) * np.abs(gain_P)
    chosen = np.sort(np.argsort(-telling_P, kind="stable")[:most_pairs])
    return TextEvidence(
        token_VE.astype(np.float32), context_VE.astype(np.float32), keys_P[chosen], rows_PE[chosen]
    )  # fmt: skip


def _smoothed(item: TextCounts, background_V: Array) -> Array:
    counts_V = item.tokens_V + SMOOTHING_TOKENS * background_V
    found_V: Array = counts_V / counts_V.sum()
    return found_V


def _followers(item: TextCounts) -> Array:
    """How many counted pairs begin with each token, [V]."""
    size = len(item.tokens_V)
    found_V: Array = np.bincount(item.keys_P // size, weights=item.pairs_P, minlength=size).astype(np.float64)
    return found_V


def _context(followers_V: Array) -> Array:
    """What backing off costs after each token: log of the share that the token's own counts leave."""
    found_V: Array = np.log(BACKOFF_TOKENS) - np.log(followers_V + BACKOFF_TOKENS)
    return found_V


def _gain(often_P: Array, share_V: Array, keys_P: NDArray[np.int64]) -> Array:
    """What having been counted adds to the log-probability of each pair."""
    found_P: Array = np.log1p(often_P / (BACKOFF_TOKENS * share_V[keys_P % len(share_V)]))
    return found_P


def _at(item: TextCounts, keys_P: NDArray[np.int64]) -> Array:
    """How often the pairs of `keys_P` occur, zero where they were not counted."""
    if not len(item.keys_P):
        return np.zeros(len(keys_P))
    place_P = np.minimum(np.searchsorted(item.keys_P, keys_P), len(item.keys_P) - 1)
    found_P: Array = np.where(item.keys_P[place_P] == keys_P, item.pairs_P[place_P], 0.0).astype(np.float64)
    return found_P
