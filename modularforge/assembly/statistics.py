"""Read and write router statistics: the file an expert's job leaves so that routers can be solved without its data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from modularforge.assembly.routing import LayerStatistics, RouterStatistics
from modularforge.model import names

EXPERT_NAME = "expert.safetensors"
ROUTER_NAME = "router.safetensors"
STATISTICS_NAME = "statistics.safetensors"


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
        "inverse_rms": [item.inverse_rms for item in statistics.layers],
    }
    save_file(tensors, path, metadata={name: json.dumps(values) for name, values in scalars.items()})


def load_statistics(path: Path) -> RouterStatistics:
    """The sums that `save_statistics` wrote, with the layers in order."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    counts, scales = json.loads(metadata["counts"]), json.loads(metadata["inverse_rms"])
    layers = [
        LayerStatistics(
            float(count),
            tensors[names.first_moment(layer)].astype(np.float64),
            tensors[names.second_moment(layer)].astype(np.float64),
            float(scale),
        )
        for layer, (count, scale) in enumerate(zip(counts, scales, strict=True))
    ]
    return RouterStatistics(layers, tensors[names.TOKEN_COUNTS].astype(np.float64))
