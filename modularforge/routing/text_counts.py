"""What a text looks like to a router that reads tokens alone: how often each token, and each pair of tokens, occurs.

A job counts its own partition and leaves the counts in its artifact, so that a router can be solved at assembly without
any data. Pairs say more of a text than tokens do, also to people: treat them as you would treat the text's index.
"""

# N tokens  V vocabulary  P pairs that are kept

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints import Artifact
from checkpoints.parsing import parse_object
from modularforge.config import Config
from modularforge.errors import DataError, MismatchError
from modularforge.routing.statistics import Array

Tokens = NDArray[Any]

COUNTS_NAME = "text.counts"  # a safetensors file; no `.safetensors`, since servers load every such file as weights
FORMAT = 1
TOKENS_AT_ONCE = 1 << 20  # of the stream: a piece's pairs are sorted at once, in several int64 arrays


@dataclass(frozen=True)
class TextCounts:
    """Counts of one text.

    `tokens_V` is how often each token occurs; `keys_P`, ascending, are pairs as previous * V + token, and `pairs_P` how
    often each occurs. Pairs are empty where none were counted.
    """

    tokens_V: Array
    keys_P: NDArray[np.int64]
    pairs_P: NDArray[np.float32]

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary V."""
        return len(self.tokens_V)

    @property
    def has_pairs(self) -> bool:
        """Whether pairs were counted."""
        return len(self.keys_P) > 0


class StoredCounts:
    """The counts of a file, checked once and read anew on every access: of a thousand experts, one's are in memory."""

    def __init__(self, path: Path) -> None:
        counts = load_counts(path)
        self._path, self.vocab_size, self.has_pairs = path, counts.vocab_size, counts.has_pairs

    @property
    def tokens_V(self) -> Array:
        """How often each token occurs."""
        return self._read("tokens").astype(np.float64)

    @property
    def keys_P(self) -> NDArray[np.int64]:
        """Pairs, ascending."""
        return self._read("keys")

    @property
    def pairs_P(self) -> NDArray[np.float32]:
        """How often each pair occurs."""
        return self._read("pairs")

    def _read(self, name: str) -> NDArray[Any]:
        with safe_open(self._path, framework="np") as file:
            found: NDArray[Any] = file.get_tensor(name)
            return found


Counts = TextCounts | StoredCounts


def only_tokens(tokens_V: Array) -> TextCounts:
    """Counts without pairs."""
    return TextCounts(tokens_V, np.empty(0, np.int64), np.empty(0, np.float32))


def count_text(tokens: Tokens, vocab_size: int, ends: Collection[int], most_tokens: int, most_pairs: int) -> TextCounts:
    """Count at most about `most_tokens` of a stream of ids, spread evenly over it, and keep the `most_pairs` commonest.

    Pairs with one of `ends`, the tokens between documents, are none. Memory is one piece of the text and what is kept.
    """
    tokens_V = np.zeros(vocab_size)
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for piece in _pieces(tokens, most_tokens):
        tokens_V += np.bincount(piece, minlength=vocab_size)[:vocab_size]
        if most_pairs:
            inside = ~np.isin(piece, list(ends))
            both = inside[:-1] & inside[1:]
            keys, counts = _added(keys, counts, (piece[:-1] * vocab_size + piece[1:])[both])
            # Rare ones go only when they are far too many: what is rare so far may become common.
            keys, counts = _commonest(keys, counts, 4 * most_pairs)
    tokens_V[list(ends)] = 0.0
    # Pairs that occur once are kept: without them an expert knows less of its own text than the background does, since
    # what is rare in each partition is less so in all of them (93 instead of 95 % kept, docs/log.md).
    keys, counts = _commonest(keys, counts, most_pairs)
    return TextCounts(tokens_V, keys, counts.astype(np.float32))


def counts_of(config: Config, tokens: Tokens, vocab_size: int, special: Collection[int]) -> TextCounts:
    """Counts of a stream as the settings say; special tokens are none of the text."""
    return count_text(tokens, vocab_size, special, config.experts.counted_tokens, config.experts.counted_pairs)


def _pieces(tokens: Tokens, most_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Pieces of the stream, all of it or evenly spread; few of them, however long the stream is."""
    count = max(1, -(-min(most_tokens, len(tokens)) // TOKENS_AT_ONCE))
    length = -(-min(most_tokens, len(tokens)) // count)
    for piece in range(count):
        start = piece * len(tokens) // count
        yield np.asarray(tokens[start : start + length], dtype=np.int64)


def _added(
    keys: NDArray[np.int64], counts: NDArray[np.int64], more: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    new, new_counts = np.unique(more, return_counts=True)
    both, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
    total = np.zeros(len(both), np.int64)
    np.add.at(total, place, np.concatenate([counts, new_counts]))
    return both, total


def _commonest(
    keys: NDArray[np.int64], counts: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The `most` pairs with the highest counts, keys ascending; of equal ones the first."""
    if len(keys) <= most:
        return keys, counts
    chosen = np.sort(np.argsort(-counts, kind="stable")[:most])
    return keys[chosen], counts[chosen]


def save_counts(path: Path, counts: TextCounts) -> None:
    """Write the counts as one safetensors file."""
    tensors: dict[str, Any] = {
        "tokens": counts.tokens_V.astype(np.float32),
        "keys": counts.keys_P,
        "pairs": counts.pairs_P,
    }
    save_file(tensors, path, metadata={"text_counts": json.dumps({"format": FORMAT})})


def load_counts(path: Path) -> TextCounts:
    """The counts that `save_counts` wrote; raises DataError."""
    try:
        with safe_open(path, framework="np") as file:
            values = parse_object((file.metadata() or {}).get("text_counts", ""))
            if values.get("format") != FORMAT:
                raise ValueError(f"its format is {values.get('format')!r:.20}, not {FORMAT}")
            tokens, keys, pairs = (file.get_tensor(name) for name in ("tokens", "keys", "pairs"))
        _check(tokens, keys, pairs)
    except Exception as error:  # safetensors raises a class of its own
        raise DataError(
            f"{path} must be a file of token counts, but is not: {error}; make the artifact it lies in again"
        ) from error
    return TextCounts(tokens.astype(np.float64), keys, pairs)


def token_occurrences(expert: Artifact) -> NDArray[np.float64]:
    """How often the text of an expert has each token, [V]; raises MismatchError where its artifact does not say."""
    if COUNTS_NAME not in expert.manifest.files:
        raise MismatchError(
            f"{expert.url} must have counts of its text ({COUNTS_NAME}) for assembly.shared counts, but has none; "
            "train it again, or set assembly.shared to equal"
        )
    return load_counts(expert.local_file(COUNTS_NAME)).tokens_V


def _check(tokens: NDArray[Any], keys: NDArray[Any], pairs: NDArray[Any]) -> None:
    """Raise ValueError unless shapes, types and order are those of counts."""
    if [str(item.dtype) for item in (tokens, keys, pairs)] != ["float32", "int64", "float32"]:
        raise ValueError("its tensors have other types")
    if tokens.ndim != 1 or keys.ndim != 1 or keys.shape != pairs.shape:
        raise ValueError("its tensors have other shapes")
    in_order = bool((np.diff(keys) > 0).all()) and (not len(keys) or 0 <= keys[0] <= keys[-1] < len(tokens) ** 2)
    if not in_order or not all(bool((np.isfinite(item) & (item >= 0)).all()) for item in (tokens, pairs)):
        raise ValueError("its counts are out of order or range")
