"""What a token, or a pair of tokens, says about the partition that a text is from, solved from counts alone.

The evidence for an expert is log p(token | previous token, its partition) less the same of the background, which is
what the backbone was trained on: naive Bayes with counts of pairs, backed off to counts of tokens. It is kept as a sum,

    evidence(token after previous) = token[token] + context[previous] + pair[previous, token],

where the last part is not zero only for pairs that were counted: a pair that no partition has costs nothing.

`write_tables` makes of it the file that lies beside an assembled model's weights, for model/text_router.py.
"""

# V vocabulary  E experts  R routed slots  P pairs

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from checkpoints import Artifact, paths
from checkpoints.parallel import in_order
from modularforge.assembly.card import special_tokens
from modularforge.model.hub_config import CONFIG_NAME, TABLES_FORMAT, end_tokens
from modularforge.routing.statistics import Array, token_counts
from modularforge.routing.text_counts import COUNTS_NAME, Counts, StoredCounts, only_tokens

SMOOTHING_TOKENS = 1000.0  # each partition's counts are mixed with so many tokens of the background
BACKOFF_TOKENS = 20.0  # and what follows a token with so many tokens of the partition's own
FILES_AT_ONCE = 8  # of a store that is far away
TIE = 0.02  # nats: what decides between experts for whom nothing speaks, far less than any text's evidence
# Chosen on the selection split of validation, ten domains, seed 0 (docs/log.md).
FILTER = {"strength": 0.4, "switch": 0.003, "switch_at_end": 0.9, "sharpness": 0.4}

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


def token_evidence(counts: Sequence[Counts], background: Counts | None = None, neutral: Collection[int] = ()) -> Array:
    """Evidence [V, E] of each token; `neutral` ones, such as special tokens, have none.

    Without a `background` it is the mean of all partitions.
    """
    background_V = background_of(counts, background)
    evidence_VE = np.empty((len(background_V), len(counts)))
    for column, item in enumerate(counts):  # one expert's counts are in memory at a time
        evidence_VE[:, column] = np.log(_smoothed(item, background_V))
    evidence_VE -= np.log(background_V)[:, None]
    evidence_VE[list(neutral)] = 0.0
    found: Array = evidence_VE
    return found


def background_of(counts: Sequence[Counts], background: Counts | None) -> Array:
    """Share of each token [V] in the background, or in all partitions alike; none is zero."""
    texts = [background] if background is not None and background.tokens_V.sum() > 0 else counts
    sizes = [_size(item) for item in texts]
    shares = (item.tokens_V / size for item, size in zip(texts, sizes, strict=True))
    share_V = sum(shares, start=np.zeros(len(texts[0].tokens_V))) / len(texts)
    # As if each token of the vocabulary had occurred a tenth of a time: less than any that was seen, whatever was read.
    share_V = share_V + 0.1 / min(sizes)
    found_V: Array = share_V / share_V.sum()
    return found_V


def pair_evidence(
    counts: Sequence[Counts], background: Counts | None, neutral: Collection[int], most_pairs: int
) -> TextEvidence:
    """The evidence of tokens and of the `most_pairs` most telling pairs.

    A pair tells the more, the more often it occurs and the more the partitions differ in it.
    """
    background_V = background_of(counts, background)
    texts = [background] if background is not None and background.has_pairs else counts
    token_VE = token_evidence(counts, background, neutral)
    keys_P = np.empty(0, np.int64)
    for item in (*counts, *texts):
        keys_P = np.union1d(keys_P, item.keys_P)
    keys_P = keys_P[~np.isin(keys_P // len(background_V), list(neutral))]
    # What follows a token in the background: the mean of the texts, as shares, and as much of it as an expert has read,
    # so that both are backed off alike.
    size = float(np.mean([_size(item) for item in counts]))
    weights = [size / _size(item) / len(texts) for item in texts]
    after_V = sum(_followers(item) * weight for item, weight in zip(texts, weights, strict=True))
    pair_P = sum(_at(item, keys_P) * weight for item, weight in zip(texts, weights, strict=True))
    context_V = _context(np.asarray(after_V))
    context_VE = np.empty((len(context_V), len(counts)), np.float32)
    for column, item in enumerate(counts):
        context_VE[:, column] = _context(_followers(item)) - context_V
    context_VE[list(neutral)] = 0.0
    background_P = _gain(np.asarray(pair_P), background_V, keys_P)
    # Which pairs are kept is known only when all experts were seen; their rows are made after that, one column at a
    # time: a row for every pair that somebody counted would be too much.
    telling_P = np.zeros(len(keys_P))
    for item in counts:
        often_P = _at(item, keys_P)
        gain_P = _gain(often_P, _smoothed(item, background_V), keys_P) - background_P
        telling_P += often_P / _size(item) * np.abs(gain_P)
    chosen = np.sort(np.argsort(-telling_P, kind="stable")[:most_pairs])
    keys_P, background_P = keys_P[chosen], background_P[chosen]
    rows_PE = np.empty((len(keys_P), len(counts)), np.float16)
    for column, item in enumerate(counts):
        rows_PE[:, column] = _gain(_at(item, keys_P), _smoothed(item, background_V), keys_P) - background_P
    return TextEvidence(token_VE.astype(np.float32), context_VE, keys_P, rows_PE)


@dataclass(frozen=True)
class Texts:
    """What is known of the texts behind a backbone and its experts, which is counts alone."""

    counts: Sequence[Counts]
    background: Counts | None
    neutral: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether every expert's job counted pairs; those of older versions did not."""
        return all(item.has_pairs for item in self.counts)

    @cached_property
    def token_VE(self) -> Array:
        """Evidence of each token in nats, against the background."""
        return token_evidence(self.counts, self.background, self.neutral)

    @cached_property
    def prior_E(self) -> Array:
        """Which experts are the most general, from -1 to 0: those whose tokens are most like the background's."""
        likeness_E = background_of(self.counts, self.background) @ self.token_VE
        likeness_E -= likeness_E.max()
        found_E: Array = likeness_E / max(1e-12, float(np.abs(likeness_E).max()))
        return found_E


def texts_of(backbone: Artifact, experts: Sequence[Artifact], learns_responses: bool = False) -> Texts:
    """The counts that lie in the artifacts; those that were made without them have at least a sample's tokens."""
    return counted_texts(backbone, list(in_order(_counts, experts, files_at_once(experts))), learns_responses)


def files_at_once(experts: Sequence[Artifact]) -> int:
    """How many files of experts are read side by side: one of a disk, since each is in memory while it is hashed."""
    return 1 if all(paths.is_local(expert.url) for expert in experts) else FILES_AT_ONCE


def counted_texts(backbone: Artifact, counts: Sequence[Counts], learns_responses: bool = False) -> Texts:
    """The same of experts whose texts have these counts.

    Where responses are learned, no token ends a document: the end of a chat's turn is the same token as the end of a
    text, and a router that forgot there would not know the prompt where the answer begins. Packed examples say
    themselves where each begins.
    """
    background = _counts(backbone) if COUNTS_NAME in backbone.manifest.files else None
    ends = () if learns_responses else end_tokens(backbone.read_json(CONFIG_NAME))
    return Texts(counts, background, special_tokens(backbone), ends)


def _counts(artifact: Artifact) -> Counts:
    if COUNTS_NAME in artifact.manifest.files:
        return StoredCounts(artifact.local_file(COUNTS_NAME))
    return only_tokens(token_counts(artifact))


def slot_priors(prior_E: Array, public: bool) -> Array:
    """Log-prior [R] of each slot: all alike but for a trace, by which the public expert comes first, then `prior_E`."""
    prior_R = TIE * np.concatenate([[1.0] if public else [], prior_E])
    found_R: Array = prior_R - np.logaddexp.reduce(prior_R)
    return found_R


def write_tables(path: Path, texts: Texts, public: bool, most_pairs: int) -> int:
    """Write the tables of a text router with at most so many pairs; returns how many it has."""
    found = pair_evidence(texts.counts, texts.background, texts.neutral, most_pairs)
    tensors: dict[str, Any] = {
        "token": found.token_VE.astype(np.float16),
        "context": found.context_VE.astype(np.float16),
        "keys": found.keys_P,
        "pair": found.pair_PE,
        "prior": slot_priors(texts.prior_E, public).astype(np.float32),
        "ends": np.asarray(texts.ends, np.int64),
    }
    metadata = {"text_router": json.dumps({"format": TABLES_FORMAT, **FILTER})}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata=metadata)
    return len(found.keys_P)


def _size(item: Counts) -> float:
    """Tokens of a text, at least one."""
    return max(1.0, float(item.tokens_V.sum()))


def _smoothed(item: Counts, background_V: Array) -> Array:
    tokens_V = item.tokens_V
    # A token that nobody has seen has the background's least share here too, or it would speak against everyone.
    counts_V = tokens_V + SMOOTHING_TOKENS * background_V + tokens_V.sum() * background_V.min()
    found_V: Array = counts_V / counts_V.sum()
    return found_V


def _followers(item: Counts) -> Array:
    """How many counted pairs begin with each token, [V]."""
    size = item.vocab_size
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


def _at(item: Counts, keys_P: NDArray[np.int64]) -> Array:
    """How often the pairs of `keys_P` occur, zero where they were not counted."""
    known_P = item.keys_P
    if not len(known_P):
        return np.zeros(len(keys_P))
    place_P = np.minimum(np.searchsorted(known_P, keys_P), len(known_P) - 1)
    found_P: Array = np.where(known_P[place_P] == keys_P, item.pairs_P[place_P], 0.0).astype(np.float64)
    return found_P
