"""Read and write router statistics: the file an expert's job leaves so that routers can be solved without its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from modularforge.assembly.routing import LayerStatistics, RouterStatistics
from modularforge.model import names

EXPERT_NAME = "expert.safetensors"
ROUTER_NAME = "router.safetensors"
STATISTICS_NAME = "statistics.safetensors"
SCALARS = "scalars"


def save_statistics(path: Path, statistics: RouterStatistics) -> None:
    """Write the sums as float32 tensors, the scalars of each layer as metadata.

    Such sums reveal something of the data they were taken on (docs/method.md).
    """
    tensors = {names.TOKEN_COUNTS: np.ascontiguousarray(statistics.tokens_V, dtype=np.float32)}
    for layer, item in enumerate(statistics.layers):
        tensors[names.first_moment(layer)] = np.ascontiguousarray(item.sum_D, dtype=np.float32)
        tensors[names.second_moment(layer)] = np.ascontiguousarray(item.outer_DD, dtype=np.float32)
    scalars = {
        "counts": [item.count for item in statistics.layers],
        "inverse_rms": (statistics.inverse_rms_L * [item.count for item in statistics.layers]).tolist(),
    }
    # One entry only: safetensors writes several in an order of chance, and the same expert must have the same bytes.
    save_file(tensors, path, metadata={SCALARS: json.dumps(scalars)})


def load_statistics(path: Path) -> RouterStatistics:
    """The sums that `save_statistics` wrote; the layers are read when they are asked for, so that memory is one's."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        scalars = json.loads(json.loads(file.read(length))["__metadata__"][SCALARS])
    counts, scales = (np.asarray(scalars[name], np.float64) for name in ("counts", "inverse_rms"))
    with safe_open(path, framework="np") as tensors:
        tokens_V = tensors.get_tensor(names.TOKEN_COUNTS).astype(np.float64)
    return RouterStatistics(_StoredLayers(path, counts.tolist()), tokens_V, scales / counts)


class _StoredLayers(Sequence[LayerStatistics]):
    """The layers of a statistics file, each read anew on every access."""

    def __init__(self, path: Path, counts: list[float]) -> None:
        self._path, self._counts = path, counts

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, layer: Any) -> Any:
        count = self._counts[layer]
        with safe_open(self._path, framework="np") as tensors:
            sums = (tensors.get_tensor(name(layer)) for name in (names.first_moment, names.second_moment))
            return LayerStatistics(count, *sums)
