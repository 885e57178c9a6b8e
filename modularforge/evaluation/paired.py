"""Differences between two models on the same text, with standard errors over documents.

Tokens of one document are alike, so documents are what is drawn: each contributes its summed loss and its tokens. A
long one counts as several, its parts: a domain may have but a few, and then the error says nothing of other ones. The
mean of a domain is a ratio of sums, whose error is that of its linearisation (Cochran, Sampling Techniques, section
6.3; the delta method); domains weigh alike, as in every mean here.
"""

# C documents

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modularforge.evaluation.probes import Probe

Sums = dict[str, Any]
Array = NDArray[np.float64]
# Neighbouring documents are taken together where a domain has more: results stay small, errors at most get larger.
MOST_DOCUMENTS = 1000
PART_TOKENS = 2048  # short enough that a domain of one long document has several
CLEAR_ERRORS = 2.0  # 95 % of what chance alone would give lies within


@dataclass(frozen=True)
class Difference:
    """Mean loss of one model less another's; without two documents in each domain its error is not known."""

    difference: float
    standard_error: float | None
    documents: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.standard_error is not None and abs(self.difference) > CLEAR_ERRORS * self.standard_error

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_clear": self.is_clear}


def document_sums(probe: Probe, scores_RT: Tensor, most: int = MOST_DOCUMENTS) -> Sums:
    """Summed loss and tokens of each document, or of its parts of PART_TOKENS, by domain, at most `most`; JSON-safe.

    Where documents are shared between domains, all domains list all of them, in one order.
    """
    labels, documents = probe.labels_RT.numpy(), probe.documents_RT.numpy()
    losses = -scores_RT.double().numpy()
    every = int(documents.max()) + 1 if probe.shares_documents else 0
    found: Sums = {"shares_documents": probe.shares_documents, "tokens": {}, "losses": {}}
    for index, label in enumerate(probe.labels):
        mine = labels == index
        if mine.any():
            groups = documents[mine] if every else _parts(documents[mine])
            count = every or int(groups.max()) + 1
            groups = groups // -(-count // most)
            size = (count - 1) // -(-count // most) + 1
            found["tokens"][label] = np.bincount(groups, minlength=size).tolist()
            sums_C = np.bincount(groups, losses[mine], minlength=size)
            found["losses"][label] = sums_C.round(4).tolist()
    return found


def _parts(documents_N: NDArray[Any]) -> NDArray[Any]:
    """The number of the part that each target is of; the targets of a document come in order."""
    _, numbers_N = np.unique(documents_N, return_inverse=True)
    counts = np.bincount(numbers_N)
    order_N = np.argsort(numbers_N, kind="stable")
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.concatenate([np.arange(count) // PART_TOKENS for count in counts])
    first = np.concatenate([[0], np.cumsum(-(-counts // PART_TOKENS))[:-1]])
    parts_N: NDArray[Any] = first[numbers_N] + places_N
    return parts_N


def mean_sums(sums: Sequence[Sums]) -> Sums:
    """The mean of several models' sums on the same documents, such as those of several seeds."""
    losses = {
        label: np.mean([np.asarray(item["losses"][label], np.float64) for item in sums], axis=0).tolist()
        for label in sums[0]["losses"]
    }
    return {**sums[0], "losses": losses}


def paired_difference(mine: Sums, other: Sums, labels: Iterable[str] | None = None) -> Difference | None:
    """Mean loss of `mine` less that of `other` over the domains; None when they were measured on other text."""
    labels = list(mine["tokens"] if labels is None else labels)
    if not labels or any(mine["tokens"].get(label) != other["tokens"].get(label) for label in labels):
        return None
    means, influences = zip(*(_domain(mine, other, label) for label in labels), strict=True)
    documents = max(map(len, influences)) if mine["shares_documents"] else sum(map(len, influences))
    if mine["shares_documents"]:
        influences = (np.sum(influences, axis=0),)
    variance = sum(_variance(influence_C) for influence_C in influences) / len(labels) ** 2
    error = math.sqrt(variance) if math.isfinite(variance) else None
    return Difference(sum(means) / len(labels), error, documents)


def differences(mine: Mapping[str, Sums], other: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
    """The difference on every probe that both were measured on, and those of its domains; for JSON."""
    found = {}
    for name in mine:
        whole = paired_difference(mine[name], other[name]) if name in other else None
        if whole is not None:
            each = {label: paired_difference(mine[name], other[name], [label]) for label in mine[name]["tokens"]}
            domains = {label: item.values() for label, item in each.items() if item is not None}
            found[name] = {**whole.values(), "domains": domains}
    return found


def _domain(mine: Sums, other: Sums, label: str) -> tuple[float, Array]:
    """The difference of a domain's means and what each document contributes to its error, [C]."""
    tokens_C = np.asarray(mine["tokens"][label], dtype=np.float64)
    change_C = np.asarray(mine["losses"][label], dtype=np.float64) - np.asarray(
        other["losses"][label], dtype=np.float64
    )
    mean = float(change_C.sum() / tokens_C.sum())
    return mean, (change_C - mean * tokens_C) / tokens_C.sum()


def _variance(influence_C: Array) -> float:
    count = len(influence_C)
    return math.inf if count < 2 else float(count / (count - 1) * np.square(influence_C).sum())
