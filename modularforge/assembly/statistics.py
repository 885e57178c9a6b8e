"""Read and write router statistics: the file an expert's job leaves so that routers can be solved without its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from modularforge.assembly.routing import LayerStatistics
from modularforge.model import names

EXPERT_NAME = "expert.safetensors"
ROUTER_NAME = "router.safetensors"
STATISTICS_NAME = "statistics.safetensors"


def save_statistics(path: Path, layers: Sequence[LayerStatistics]) -> None:
    """Write the sums of all layers as float32 tensors, the token count as metadata.

    Second-order sums reveal something of the data they were taken on (docs/method.md).
    """
    tensors = {}
    for layer, item in enumerate(layers):
        tensors[names.first_moment(layer)] = np.ascontiguousarray(item.sum_D, dtype=np.float32)
        tensors[names.second_moment(layer)] = np.ascontiguousarray(item.outer_DD, dtype=np.float32)
    save_file(tensors, path, metadata={"counts": json.dumps([item.count for item in layers])})


def load_statistics(path: Path) -> list[LayerStatistics]:
    """Sums of all layers, in order."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        counts = json.loads(json.loads(file.read(length))["__metadata__"]["counts"])
    return [
        LayerStatistics(
            float(count),
            tensors[names.first_moment(layer)].astype(np.float64),
            tensors[names.second_moment(layer)].astype(np.float64),
        )
        for layer, count in enumerate(counts)
    ]
