"""Router statistics and their file: what an expert's job leaves so that routers can be solved without its data.

Statistics are sums over the tokens of a partition: how often each token occurs, and per layer the token count, the sum
of the router inputs x and, where they are wanted, of their outer products.
"""

# D width  V vocabulary  L layers

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from checkpoints import Artifact, CorruptArtifactError, safetensors
from checkpoints.parsing import parse_object
from modularforge.assembly.values import values_of
from modularforge.errors import DataError
from modularforge.facts import fact

ROUTER_NAME = "router.safetensors"
"""Rows that an expert learned."""
STATISTICS_NAME = "statistics.safetensors"
SCALARS = "scalars"
HEADER_FACT = "statistics_header"
READ_WHOLE_BYTES = 1 << 20  # one request is quicker than one for each layer
TOKEN_COUNTS = "tokens"
LARGEST_SUM = 1e300  # JSON has whole numbers of any size, and numpy raises for those beyond float64

Array = NDArray[np.float64]
NO_PRODUCTS: Array = np.zeros((0, 0))
NO_TOKENS: Array = np.zeros(0)


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the router inputs of one layer: `count` tokens, `sum_D` of x, `outer_DD` of x times x transposed.

    Where outer products were not gathered, theirs is empty.
    """

    count: float
    sum_D: Array
    outer_DD: Array

    @property
    def mean_D(self) -> Array:
        """Mean router input."""
        return self.sum_D / self.count


@dataclass(frozen=True)
class RouterStatistics:
    """What one job counted on its partition.

    The layers' sums, how often each token of the vocabulary occurs, and for each layer the mean of one over the root
    mean square of the residual stream that the router inputs were normalised from.
    """

    layers: Sequence[LayerStatistics]
    tokens_V: Array
    inverse_rms_L: Array


def save_statistics(path: Path, statistics: RouterStatistics) -> None:
    """Write the sums as float32 tensors, the scalars of each layer as metadata.

    Such sums reveal something of the data they were taken on (docs/method.md).
    """
    tensors = {TOKEN_COUNTS: np.ascontiguousarray(statistics.tokens_V, dtype=np.float32)}
    for layer, item in enumerate(statistics.layers):
        tensors[_first_moment(layer)] = np.ascontiguousarray(item.sum_D, dtype=np.float32)
        if item.outer_DD.size:
            tensors[_second_moment(layer)] = np.ascontiguousarray(item.outer_DD, dtype=np.float32)
    scalars = {
        "counts": [item.count for item in statistics.layers],
        "inverse_rms": (statistics.inverse_rms_L * [item.count for item in statistics.layers]).tolist(),
    }
    # One entry only: safetensors writes several in an order of chance, and the same expert must have the same bytes.
    save_file(tensors, path, metadata={SCALARS: json.dumps(scalars)})


def header_hash(path: Path) -> str:
    """Hash of a statistics file's header, length included: what says that its scalars are right, read without the rest.

    A job records it in its manifest as the fact `HEADER_FACT`; tensors have hashes of their own there.
    """
    with open(path, "rb") as file:
        head = file.read(safetensors.LENGTH_BYTES)
        return hashlib.sha256(head + file.read(safetensors.header_length(head))).hexdigest()


def stored_statistics(artifact: Artifact, products: bool) -> RouterStatistics:
    """What a job counted, from its artifact on any store: no more than the header, and a layer's sums when asked for.

    Both are compared with their hashes. Outer products, gigabytes in wide models, are read where they are wanted; how
    often each token occurs is not (`token_counts`). Of an artifact that does not record the header's hash, or whose
    file is small, the file is read whole.
    """
    entry, recorded = artifact.entry(STATISTICS_NAME), fact(artifact, HEADER_FACT, "")
    if not recorded or entry.size <= READ_WHOLE_BYTES:
        return replace(load_statistics(artifact.local_file(STATISTICS_NAME)), tokens_V=NO_TOKENS)
    url = artifact.file_url(STATISTICS_NAME)
    head = _head(url, entry.size)
    if hashlib.sha256(head).hexdigest() != recorded:
        raise CorruptArtifactError(
            f"{url} must have the header that its manifest records, but has another; restore it from a copy, or make "
            "the artifact again"
        )
    header = _parsed(url, head, entry.size)
    counts, scales = _scalars(header)
    spans = safetensors.spans_in(url, header, entry.tensors)
    return RouterStatistics(_RangedLayers(spans, counts.tolist(), products), NO_TOKENS, scales / np.maximum(counts, 1))


def token_counts(artifact: Artifact) -> Array:
    """How often each token occurs, [V], read alone and compared with its hash where the file is large."""
    entry = artifact.entry(STATISTICS_NAME)
    if entry.size <= READ_WHOLE_BYTES:
        return load_statistics(artifact.local_file(STATISTICS_NAME)).tokens_V
    url = artifact.file_url(STATISTICS_NAME)
    header = _parsed(url, _head(url, entry.size), entry.size)
    return values_of(safetensors.spans_in(url, header, entry.tensors)[TOKEN_COUNTS]).astype(np.float64)


def _head(url: str, size: int) -> bytes:
    """The header of a weight file, length included; one request where it is of a usual length."""
    read = safetensors.reader(url, size)
    try:
        end = safetensors.LENGTH_BYTES + safetensors.header_length(read(0, safetensors.LENGTH_BYTES))
    except ValueError as error:
        raise _wrong(url, error) from error
    return read(0, min(end, size))


def _parsed(url: str, head: bytes, size: int) -> safetensors.Header:
    """The header, which is that of statistics; raises DataError."""
    try:
        header = safetensors.read_header(lambda start, end: head[start:end], size)
        _check_shapes(header, len(_scalars(header)[0]))
    except ValueError as error:
        raise _wrong(url, error) from error
    return header


def _wrong(place: object, error: Exception) -> DataError:
    return DataError(
        f"{place} must be a file of router statistics, but is not: {error}; make the artifact it lies in again"
    )


def load_statistics(path: Path) -> RouterStatistics:
    """The sums that `save_statistics` wrote; the layers are read when they are asked for, so that memory is one's."""
    try:
        with open(path, "rb") as file:
            header = safetensors.read_header(lambda start, end: file.read(end - start), path.stat().st_size)
        counts, scales = _scalars(header)
        _check_shapes(header, len(counts))
    except ValueError as error:
        raise _wrong(path, error) from error
    with safe_open(path, framework="np") as tensors:
        tokens_V = tensors.get_tensor(TOKEN_COUNTS).astype(np.float64)
    return RouterStatistics(_StoredLayers(path, counts.tolist()), tokens_V, scales / np.maximum(counts, 1))


def _scalars(header: safetensors.Header) -> tuple[Array, Array]:
    """Token counts of the layers, and sums of one over the root mean square; raises ValueError."""
    scalars = parse_object(header.metadata.get(SCALARS, ""))
    found = [scalars.get(name) for name in ("counts", "inverse_rms")]
    for values in found:
        if not isinstance(values, list) or not all(_is_sum(value) for value in values):
            raise ValueError(f"its {SCALARS} are {scalars!r:.60}")
    counts, scales = (np.asarray(values, np.float64) for values in found)
    if not len(counts) or counts.shape != scales.shape:
        raise ValueError(f"its {SCALARS} are {scalars!r:.60}")
    return counts, scales


def _is_sum(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LARGEST_SUM


def _check_shapes(header: safetensors.Header, layers: int) -> None:
    """Raise ValueError unless the tensors are there, of one width, as float32."""
    width = header.tensors[first].shape[-1:] if (first := _first_moment(0)) in header.tensors else (0,)
    expected: dict[str, tuple[int, ...]] = {_first_moment(layer): width for layer in range(layers)}
    if any(_second_moment(layer) in header.tensors for layer in range(layers)):
        expected |= {_second_moment(layer): (*width, *width) for layer in range(layers)}
    for name, shape in expected.items():
        entry = header.tensors.get(name)
        if entry is None or entry.shape != shape or entry.dtype != "F32":
            raise ValueError(f"{name} must be F32 {shape}, but is {entry and entry[:2]}")
    tokens = header.tensors.get(TOKEN_COUNTS)
    if tokens is None or len(tokens.shape) != 1 or tokens.dtype != "F32":
        raise ValueError(f"{TOKEN_COUNTS} must be a vector of F32, but is {tokens and tokens[:2]}")


class _StoredLayers(Sequence[LayerStatistics]):
    """The layers of a statistics file, each read anew on every access."""

    def __init__(self, path: Path, counts: list[float]) -> None:
        self._path, self._counts = path, counts

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, layer: Any) -> Any:
        count = self._counts[layer]
        with safe_open(self._path, framework="np") as tensors:
            names = tensors.keys()
            sums = (
                tensors.get_tensor(name(layer)) if name(layer) in names else NO_PRODUCTS
                for name in (_first_moment, _second_moment)
            )
            return LayerStatistics(count, *sums)


class _RangedLayers(Sequence[LayerStatistics]):
    """The layers of a statistics file of any store, each read by ranges on every access and compared with its hash."""

    def __init__(self, spans: dict[str, safetensors.TensorSpan], counts: list[float], products: bool) -> None:
        self._spans, self._counts, self._products = spans, counts, products

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, layer: Any) -> Any:
        outer = _second_moment(layer)
        products: Any = self._read(outer) if self._products and outer in self._spans else NO_PRODUCTS
        return LayerStatistics(self._counts[layer], self._read(_first_moment(layer)), products)

    def _read(self, name: str) -> Any:
        return values_of(self._spans[name]).reshape(self._spans[name].shape)


def _first_moment(layer: int) -> str:
    """Name of the sum of a layer's router inputs."""
    return f"layers.{layer}.sum"


def _second_moment(layer: int) -> str:
    """Name of the sum of outer products of a layer's router inputs."""
    return f"layers.{layer}.outer"
