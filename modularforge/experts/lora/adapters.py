"""Committed adapters as their headers say, and the mean of what several add; needs no torch."""

# R rank  I inputs of a matrix  O its outputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoints import Artifact
from checkpoints.safetensors import TensorSpan
from modularforge.assembly.plan import spans_of
from modularforge.assembly.values import values_of
from modularforge.config import MODULES
from modularforge.facts import fact
from modularforge.model import names
from modularforge.model.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterShape,
    check_fits,
    paired,
    parse_adapter_config,
)

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """One expert's adapter: `pairs` are where A and B lie, by the name of the backbone's matrix."""

    url: str
    shape: AdapterShape
    pairs: Mapping[str, tuple[TensorSpan, TensorSpan]]

    @property
    def parameters(self) -> int:
        """Entries of all A and B."""
        return sum(int(np.prod(span.shape)) for pair in self.pairs.values() for span in pair)


def adapter_of(expert: Artifact, backbone: Mapping[str, TensorSpan]) -> Adapter:
    """The adapter of a committed expert; raises DataError or MismatchError unless it fits the backbone's tensors."""
    shape = parse_adapter_config(expert.read_bytes(ADAPTER_CONFIG), expert.file_url(ADAPTER_CONFIG))
    origin = expert.file_url(ADAPTER_WEIGHTS)
    pairs = paired(spans_of(expert, ADAPTER_WEIGHTS), origin)
    for name, (a, b) in pairs.items():
        check_fits(origin, name, a.shape, b.shape, backbone[name].shape if name in backbone else None, shape.rank)
    return Adapter(expert.url, shape, pairs)


def base_name(backbone: Artifact) -> str | None:
    """What PEFT calls the base of an adapter: the pretrained model's name on the Hub, where it has one."""
    found: str | None = (fact(backbone, "pretrained", None) or {}).get("hub")
    return found


@dataclass(frozen=True)
class Mean:
    """One adapter that adds the mean of what several add.

    The mean of the products B A is no product of mean matrices: A of all are put below each other, and B, over their
    number, beside each other. The rank is the sum of theirs, and nothing is lost.
    """

    adapters: Sequence[Adapter]

    @property
    def shape(self) -> AdapterShape:
        """Its shape, with a scale of one: the others' scales are in B."""
        rank = sum(adapter.shape.rank for adapter in self.adapters)
        found = {name.split(".")[-2] for name in self.names}
        return AdapterShape(rank, float(rank), tuple(name for name in MODULES if name in found))

    @property
    def names(self) -> list[str]:
        """The matrices that any of them stands beside."""
        return sorted({name for adapter in self.adapters for name in adapter.pairs})

    def tensors(self) -> dict[str, Matrix]:
        """A [R, I] and B [O, R] beside each matrix, by PEFT's names; an adapter that is not there adds nothing."""
        found: dict[str, Matrix] = {}
        for name in self.names:
            shapes = [adapter.pairs[name] for adapter in self.adapters if name in adapter.pairs]
            rows, columns, rank = shapes[0][1].shape[0], shapes[0][0].shape[1], self.shape.rank
            a_RI, b_OR, first = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32), 0
            for adapter in self.adapters:
                own = slice(first, first := first + adapter.shape.rank)
                if name in adapter.pairs:
                    a, b = adapter.pairs[name]
                    a_RI[own] = values_of(a).reshape(a.shape)
                    b_OR[:, own] = values_of(b).reshape(b.shape) * (adapter.shape.scale / len(self.adapters))
            found |= zip(names.adapter_pair(name), (a_RI, b_OR), strict=True)
        return found

    @property
    def parameters(self) -> int:
        """Entries of all A and B."""
        shapes = {name: pair for adapter in self.adapters for name, pair in adapter.pairs.items()}
        return self.shape.rank * sum(a.shape[1] + b.shape[0] for a, b in shapes.values())
