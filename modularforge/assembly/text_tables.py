"""The tables of the text router that lies beside an assembled model's weights, solved from what the jobs counted."""

# V vocabulary  E experts  R routed slots  P pairs

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoints import Artifact
from modularforge.assembly.evidence import TIE
from modularforge.assembly.routing import Array
from modularforge.assembly.small_files import special_tokens
from modularforge.assembly.statistics import STATISTICS_NAME, load_statistics
from modularforge.assembly.text_counts import COUNTS_NAME, TextCounts, load_counts, only_tokens
from modularforge.assembly.text_evidence import background_of, pair_evidence, token_evidence
from modularforge.model.hub_config import CONFIG_NAME, TABLES_FORMAT, end_tokens

# Chosen on the deciding half of validation, ten domains, seed 0 (docs/log.md).
FILTER = {"strength": 0.4, "switch": 0.003, "switch_at_end": 0.9, "sharpness": 0.4}


@dataclass(frozen=True)
class Texts:
    """What is known of the texts behind a backbone and its experts, which is counts alone."""

    counts: Sequence[TextCounts]
    background: TextCounts | None
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


def texts_of(backbone: Artifact, experts: Sequence[Artifact]) -> Texts:
    """The counts that lie in the artifacts; those that were made without them have at least a sample's tokens."""
    background = _counts(backbone) if COUNTS_NAME in backbone.manifest.files else None
    ends = end_tokens(backbone.read_json(CONFIG_NAME))
    return Texts([_counts(expert) for expert in experts], background, special_tokens(backbone), ends)


def _counts(artifact: Artifact) -> TextCounts:
    if COUNTS_NAME in artifact.manifest.files:
        return load_counts(artifact.local_file(COUNTS_NAME))
    return only_tokens(load_statistics(artifact.local_file(STATISTICS_NAME)).tokens_V)


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
