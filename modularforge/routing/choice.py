"""The routers of an assembled model, chosen by the settings and solved from what the experts' jobs left behind."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from checkpoints import Artifact
from modularforge.config import TRAINED_ROUTERS, Config, ModelConfig
from modularforge.model import names
from modularforge.routing import evidence
from modularforge.routing.solvers import centred_means, equalised, kaiming, ridge, uniform, with_public
from modularforge.routing.statistics import ROUTER_NAME, STATISTICS_NAME, Array, RouterStatistics, load_statistics
from modularforge.routing.text_evidence import Texts

Rows = NDArray[np.float32]


def all_statistics(experts: list[Artifact]) -> list[RouterStatistics]:
    """What the experts' jobs counted, in order; layers are read when they are asked for."""
    return [load_statistics(expert.local_file(STATISTICS_NAME)) for expert in experts]


def widening_of(config: Config, model: ModelConfig, experts: int) -> evidence.Widening:
    """How much the evidence router widens a backbone of this shape."""
    return evidence.Widening(model, experts, config.assembly.width_multiple, config.assembly.head_multiple)


def router_rows(
    config: Config, experts: list[Artifact], model: ModelConfig, texts: Texts | None = None
) -> dict[str, Rows]:
    """The router matrix of every layer, by name, float32 [R, D]; [R, D + C] for the evidence router.

    `model` is the backbone's shape; `texts` is needed for the evidence router.
    """
    settings, public = config.assembly, config.has_public_expert
    if settings.router == "evidence":
        assert texts is not None
        widening, statistics = widening_of(config, model, len(experts)), all_statistics(experts)
        solved = evidence.router_rows(widening, statistics, texts.prior_E, settings.router_temperature, public)
        rows = list(solved)
    else:
        is_solved = settings.router in ("data_stats", "centred_means")
        statistics = all_statistics(experts) if is_solved else []
        rows = [_layer_rows(config, experts, statistics, layer, model) for layer in range(model.layers)]
    # safetensors writes an array's memory as it lies: a transposed one would be saved scrambled.
    return {
        names.gate(layer, model.family): np.ascontiguousarray(item, dtype=np.float32) for layer, item in enumerate(rows)
    }


def _layer_rows(
    config: Config, experts: list[Artifact], statistics: list[RouterStatistics], layer: int, model: ModelConfig
) -> Array:
    settings, public = config.assembly, config.has_public_expert
    count = len(experts) + int(public)
    if settings.router == "kaiming":
        return kaiming(count, model.width, config.seed * 1000 + layer)
    if settings.router == "uniform":
        return uniform(count, model.width)
    if settings.router in TRAINED_ROUTERS:
        name = names.gate(layer, model.family)
        rows = [load_file(expert.local_file(ROUTER_NAME))[name] for expert in experts]
        learned_ED = np.concatenate(rows).astype(np.float64)
        return with_public(equalised(learned_ED) if settings.router == "equalised" else learned_ED, public)
    sums = (item.layers[layer] for item in statistics)
    if settings.router == "data_stats":
        return with_public(ridge(sums, settings.ridge_penalty, settings.router_temperature), public)
    return with_public(centred_means(sums, settings.router_temperature), public)
