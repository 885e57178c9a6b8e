"""The shared weights of many experts as one: their mean, and the steps that merges between rounds take towards it.

All of them are weighted sums of tensors that lie in committed files, and are streamed: memory is a few blocks, whatever
the size of the model and the number of experts. Every tensor that is read is compared with its hash. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import Artifact, digests, paths
from checkpoints.hashing import describe_file
from checkpoints.parallel import in_order
from checkpoints.safetensors import ITEM_BYTES, WEIGHTS_NAME, TensorSpan, header_bytes, read_spans
from modularforge.assembly.plan import METADATA, spans_of
from modularforge.assembly.values import converted
from modularforge.config import OuterConfig
from modularforge.errors import MismatchError
from modularforge.facts import fact
from modularforge.model import names

SHARED_NAME = "shared.safetensors"
"""What an expert's job, or a merge, has made of the weights that all experts share."""
MOMENTUM_NAME = "momentum.safetensors"
BLOCK_VALUES = 1 << 20
READS_AHEAD = 8  # of a store that is far away, to hide its latency
BASE_COUNT = 1000.0
"""With how many occurrences a row counts as it was: what is rarely met stays, whoever met it (docs/rounds.md)."""

Spans = Mapping[str, TensorSpan]
Counts = Callable[[Artifact], NDArray[np.float64]]


@dataclass(frozen=True)
class Term:
    """A tensor and what its values are multiplied by: all alike, or each row by its own."""

    span: TensorSpan
    weight: float | NDArray[np.float64]

    @property
    def order(self) -> tuple[str, float, bytes]:
        """Its place in a sum, whatever order the experts have."""
        weight = np.asarray(self.weight)
        return self.span.digest, float(weight.sum()), weight.tobytes()

    def weight_of(self, start: int, end: int, row: int) -> float | NDArray[np.float64]:
        """What the values [start, end) are multiplied by, where a row has so many."""
        if isinstance(self.weight, float):
            return self.weight
        found: NDArray[np.float64] = self.weight[np.arange(start, end) // row]
        return found


Sums = Mapping[str, Sequence[Term]]
"""Tensors by name, each as the sum of others of its shape."""


def shared_tensors(expert: Artifact) -> Mapping[str, str]:
    """Hashes, by name, of what an expert has made of shared weights; none of one that trained none."""
    return expert.entry(SHARED_NAME).tensors if SHARED_NAME in expert.manifest.files else {}


def shares_of(experts: Sequence[Artifact], weighting: str) -> list[float]:
    """How much each expert weighs in a mean, together 1: alike, or (`tokens`) by the tokens of its partition."""
    weights = [float(fact(expert, "partition_tokens")) if weighting == "tokens" else 1.0 for expert in experts]
    total = sum(weights)
    return [weight / total for weight in weights]


def means(
    base: Spans, experts: Sequence[Artifact], weighting: str, counts: Counts | None = None
) -> dict[str, list[Term]]:
    """The mean of each tensor that any expert has trained; one that left it as it was counts with that, the base's.

    With `counts` weighting, `counts` says how often the text of an expert has each token, [V].
    """
    own = [spans_of(expert, SHARED_NAME) if shared_tensors(expert) else {} for expert in experts]
    if weighting == "own":  # these lie beside the model, and its own are the backbone's
        own = [{name: span for name, span in spans.items() if not is_row(name)} for spans in own]
    shares = shares_of(experts, weighting) if any(own) else []
    found = {
        name: [Term(spans.get(name, base[name]), share) for spans, share in zip(own, shares, strict=True)]
        for name in sorted({name for spans in own for name in spans})
    }
    if weighting == "counts":
        rows = [name for name in found if is_row(name)]
        assert counts is not None
        found |= _by_rows(base, np.stack([counts(expert) for expert in experts]), own, rows) if rows else {}
    return found


def _by_rows(
    base: Spans, counts_KV: NDArray[np.float64], own: Sequence[Spans], rows: Sequence[str]
) -> dict[str, list[Term]]:
    """Matrices with a row for each token: its mean over experts by how often their text has it, and over the base.

    A job moves the rows of tokens that it never meets too: their logits are lowered in every step, and AdamW makes a
    step of full size of a small gradient. In a plain mean, nine of ten experts do that to the words of the tenth.
    """
    weights_KV = counts_KV / (counts_KV.sum(axis=0) + BASE_COUNT)
    for name in rows:
        if base[name].shape[0] != counts_KV.shape[1]:
            raise MismatchError(
                f"{name} must have a row for each of the {counts_KV.shape[1]} tokens that experts counted, but has "
                f"{base[name].shape[0]}; set assembly.shared to equal"
            )
    return {
        name: [
            *(Term(spans.get(name, base[name]), weights_KV[k]) for k, spans in enumerate(own)),
            Term(base[name], 1.0 - weights_KV.sum(axis=0)),
        ]
        for name in rows
    }


def outer_step(mean: Sums, base: Spans, momentum: Spans, outer: OuterConfig) -> tuple[Sums, Sums]:
    """New weights and new momentum of DiLoCo's outer optimizer (arXiv 2311.08105), SGD with Nesterov momentum.

    The gradient is g = base - mean, the momentum m' = μ m + g, and the weights are base - η (g + μ m'). Before the
    first merge there is no momentum.
    """
    rate, share = outer.rate, outer.momentum
    steps: dict[str, list[Term]] = {}
    momenta: dict[str, list[Term]] = {}
    for name, terms in mean.items():
        old = [Term(momentum[name], 1.0)] if name in momentum else []
        towards = rate * (1 + share)
        steps[name] = [Term(base[name], 1 - towards), *_times(terms, towards), *_times(old, -rate * share**2)]
        momenta[name] = [Term(base[name], 1.0), *_times(terms, -1.0), *_times(old, share)]
    return steps, momenta


def _times(terms: Sequence[Term], factor: float) -> list[Term]:
    return [Term(term.span, term.weight * factor) for term in terms]


def is_row(name: str) -> bool:
    """Whether a tensor has a row for each token: embeddings and head."""
    return names.shared_part(name) in ("embeddings", "head")


def write_own_rows(path: Path, backbone: Artifact, experts: Sequence[Artifact]) -> int:
    """Write each expert's embeddings and head into one file, streamed; one that trained none has the backbone's.

    Returns how many values one expert has. Raises MismatchError where no expert trained any.
    """
    base = spans_of(backbone, WEIGHTS_NAME)
    own = [spans_of(expert, SHARED_NAME) if shared_tensors(expert) else {} for expert in experts]
    rows = sorted({name for spans in own for name in spans if is_row(name)})
    if names.EMBEDDING not in rows:
        raise MismatchError(
            "assembly.shared must be equal where no expert has embeddings of its own, but is own; train with "
            "experts.unfreeze [embeddings, head], or change it"
        )
    sums = {
        names.own_row(index, name): [Term(spans.get(name, base[name]), 1.0)]
        for index, spans in enumerate(own)
        for name in rows
    }
    with open(path, "wb") as file:
        for chunk in chunks(sums, {name: terms[0].span.dtype for name, terms in sums.items()}):
            file.write(chunk)
    return sum(prod(base[name].shape) for name in rows)


def write_means(
    path: Path, base: Spans, experts: Sequence[Artifact], weighting: str, counts: Counts | None = None
) -> dict[str, TensorSpan]:
    """Write the mean of what experts share, in the base's types; returns its tensors, none where nothing was trained.

    Raises MismatchError for a tensor of another shape, and for one that is not what its manifest says.
    """
    sums = means(base, experts, weighting, counts)
    if not sums:
        return {}
    with open(path, "wb") as file:
        for chunk in chunks(sums, {name: base[name].dtype for name in sums}):
            file.write(chunk)
    return read_spans(str(path), describe_file(path).tensors)


def backbone_spans(backbone: Artifact) -> dict[str, TensorSpan]:
    """The tensors that experts begin with."""
    return spans_of(backbone, WEIGHTS_NAME)


def size_of(sums: Sums, types: Mapping[str, str]) -> int:
    """Bytes of the file of these sums, but for its header."""
    return sum(prod(terms[0].span.shape) * ITEM_BYTES[types[name]] for name, terms in sums.items())


def chunks(sums: Sums, types: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a weight file of these sums, each tensor of its type (safetensors' name).

    Terms are added in float64 in the order of their hashes, so that the order of experts changes no bit.
    """
    names = sorted(sums, key=lambda name: (-ITEM_BYTES[types[name]], types[name], name))
    shapes = {name: _shape(name, sums[name]) for name in names}
    yield header_bytes(
        ((name, types[name], shapes[name], prod(shapes[name]) * ITEM_BYTES[types[name]]) for name in names), METADATA
    )
    for name in names:
        terms = sorted(sums[name], key=lambda term: term.order)
        for block in _blocks(name, terms, shapes[name]):
            yield converted(np.ascontiguousarray(block.astype("<f4")).data.cast("B"), "F32", types[name]).tobytes()


def _shape(name: str, terms: Sequence[Term]) -> tuple[int, ...]:
    shape = terms[0].span.shape
    for term in terms:
        if term.span.shape != shape:
            raise MismatchError(
                f"{name} in {term.span.url} must have the shape {shape} of the other experts', but has "
                f"{term.span.shape}; use experts of one backbone"
            )
    return shape


def _blocks(name: str, terms: Sequence[Term], shape: tuple[int, ...]) -> Iterator[Any]:
    """The sum in blocks of float64; hashes are compared when all of a tensor was read."""
    hashes, values, row = [digests.like(term.span.digest) for term in terms], prod(shape), prod(shape[1:])
    for start in range(0, values, BLOCK_VALUES):
        end = min(start + BLOCK_VALUES, values)
        total = np.zeros(end - start)
        for digest, term, content in zip(hashes, terms, _contents(terms, start, end), strict=True):
            digest.update(content)
            total += term.weight_of(start, end, row) * converted(content, term.span.dtype, "F32").astype(np.float64)
        yield total
    for digest, term in zip(hashes, terms, strict=True):
        if term.span.digest and digest.text() != term.span.digest:
            raise MismatchError(
                f"{name} in {term.span.url} must have the hash that its manifest says, but differs: the file was "
                "changed or damaged after it was committed; delete that artifact and run its stage again"
            )


def _contents(terms: Sequence[Term], start: int, end: int) -> Iterator[bytes]:
    """The same values of each tensor, read ahead where that takes time."""

    def read(term: Term) -> bytes:
        span, width = term.span, ITEM_BYTES[term.span.dtype]
        return paths.read_bytes(span.url, span.start + start * width, span.start + end * width)

    if all(paths.is_local(term.span.url) for term in terms):
        return map(read, terms)
    return in_order(read, terms, READS_AHEAD)
