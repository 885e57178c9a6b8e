"""Router rows of an assembled model: chosen by the settings, trained with the experts or solved from their statistics.

Needs no torch. Sums add up, so routers of any set of experts can be solved at assembly without any data.
"""

# D width  C channels  E experts (trained ones)  R router rows (E, and one for the public expert if it is kept)

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from checkpoints import Artifact
from checkpoints.parallel import in_order
from modularforge.config import TRAINED_ROUTERS, Config, ModelConfig
from modularforge.errors import MismatchError
from modularforge.model import names
from modularforge.routing import evidence
from modularforge.routing.statistics import (
    ROUTER_NAME,
    Array,
    LayerStatistics,
    RouterStatistics,
    stored_statistics,
)
from modularforge.routing.text_evidence import Texts, files_at_once

Rows = NDArray[np.float32]


def all_statistics(experts: list[Artifact], products: bool) -> list[RouterStatistics]:
    """What the experts' jobs counted, in order; layers, with their outer products or without, are read when asked for.

    Without how often each token occurs, which no solver wants: 400 MB of a thousand experts with 50,000 entries.
    """
    return list(in_order(lambda expert: stored_statistics(expert, products), experts, files_at_once(experts)))


def widening_of(config: Config, model: ModelConfig, experts: int) -> evidence.Widening:
    """How much the evidence router widens a backbone of this shape."""
    return evidence.Widening(model, experts, config.assembly.width_multiple, config.assembly.head_multiple)


def router_rows(
    config: Config,
    experts: list[Artifact],
    model: ModelConfig,
    texts: Texts | None = None,
    statistics: list[RouterStatistics] | None = None,
) -> dict[str, Rows]:
    """The router matrix of every layer, by name, float32 [R, D]; [R, D + C] for the evidence router.

    `model` is the backbone's shape; `texts` is needed for the evidence router, whose `statistics` may be known.
    """
    settings, public = config.assembly, config.has_public_expert
    if settings.router == "evidence":
        assert texts is not None
        widening = widening_of(config, model, len(experts))
        statistics = all_statistics(experts, products=False) if statistics is None else statistics
        solved = evidence.router_rows(widening, statistics, texts.prior_E, settings.router_temperature, public)
        rows = list(solved)
    else:
        is_solved = settings.router in ("ridge", "means")
        statistics = all_statistics(experts, settings.router == "ridge") if is_solved else []
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
    if settings.router == "random":
        return random(count, model.width, config.seed * 1000 + layer)
    if settings.router == "uniform":
        return uniform(count, model.width)
    if settings.router in TRAINED_ROUTERS:
        name = names.gate(layer, model.family)
        rows = [load_file(expert.local_file(ROUTER_NAME))[name] for expert in experts]
        trained_ED = np.concatenate(rows).astype(np.float64)
        return with_public(equalised(trained_ED) if settings.router == "trained_equalised" else trained_ED, public)
    if settings.router == "ridge":
        one_by_one = (item.layers[layer] for item in statistics)  # of matrices, one is in memory
        return with_public(ridge(one_by_one, settings.ridge_penalty, settings.router_temperature), public)
    assert settings.router == "means", settings.router
    sums = in_order(lambda item: item.layers[layer], statistics, files_at_once(experts))
    return with_public(means(sums, settings.router_temperature), public)


ROWS_AT_ONCE = 256  # of a matrix [D, D] that is added up: without it a second one of float64 would be in memory


def with_public(rows_ED: Array, public_expert: bool) -> Array:
    """Put the public expert's row, which is zero, before the others when that expert is kept."""
    return np.concatenate([np.zeros((1, rows_ED.shape[1])), rows_ED]) if public_expert else rows_ED


def means(statistics: Iterable[LayerStatistics], temperature: float) -> Array:
    """Rows [E, D]: each expert's mean input less the mean of all, at unit length, over the temperature."""
    means_ED = np.stack([item.mean_D for item in statistics])
    centred_ED = means_ED - means_ED.mean(axis=0)
    length_E = np.linalg.norm(centred_ED, axis=1, keepdims=True)
    rows_ED: Array = centred_ED / np.maximum(length_E, 1e-12) / np.sqrt(centred_ED.shape[1]) / temperature
    return rows_ED


def equalised(rows_ED: Array) -> Array:
    """Trained rows at the mean of their lengths: a longer row wins tokens by that alone (PHATGOOSE, 2402.05859)."""
    length_E = np.linalg.norm(rows_ED, axis=1, keepdims=True)
    rows: Array = rows_ED * (length_E.mean() / np.maximum(length_E, 1e-12))
    return rows


def ridge(statistics: Iterable[LayerStatistics], penalty: float, temperature: float) -> Array:
    """Rows [E, D] that predict from an input which partition it came from (DUME, arXiv 2603.29765).

    Ridge regression of the centred one-hot label (1 - 1/E for the own partition, -1/E elsewhere) on the inputs, every
    partition weighted alike; `penalty` is a share of the mean diagonal of the second moments. Centring makes zero, the
    public expert's logit, the score of an input that belongs nowhere in particular. Statistics are taken one at a
    time: memory is one float64 matrix [D, D] and one of a job.

    There is no intercept, because no Hugging Face router has a slot for one. Nothing is lost by that: an intercept that
    is folded into the rows along the direction that predicts one from the inputs gives these very rows.
    """
    of_each: list[Array] = []
    second_DD = np.zeros((0, 0))
    for item in statistics:
        if not item.outer_DD.size:
            raise MismatchError(
                "experts must have statistics with outer products for assembly.router ridge, but one has sums alone; "
                "use another router, or train it again with experts.statistics moments"
            )
        second_DD = second_DD if of_each else np.zeros(item.outer_DD.shape)
        of_each.append(item.mean_D)
        for start in range(0, len(second_DD), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            second_DD[rows] += item.outer_DD[rows] / item.count
    means_ED, experts, width = np.stack(of_each), len(of_each), len(second_DD)
    second_DD /= experts
    target_ED = (means_ED - means_ED.mean(axis=0)) / experts
    second_DD[np.diag_indices(width)] += penalty * np.trace(second_DD) / width
    # Its transpose is the same matrix in LAPACK's order, so that it is solved in place.
    from scipy.linalg import solve

    rows_ED: Array = solve(second_DD.T, target_ED.T, overwrite_a=True, assume_a="pos").T / temperature
    return rows_ED


def random(rows: int, width: int, seed: int) -> Array:
    """Random rows, uniform within sqrt(3 / width): what an untrained router has (He et al., arXiv 1502.01852)."""
    bound = np.sqrt(3.0 / width)
    return np.random.default_rng(seed).uniform(-bound, bound, (rows, width))


def uniform(rows: int, width: int) -> Array:
    """Zero rows: all experts weigh the same, and each token must visit all of them for that to mean anything."""
    return np.zeros((rows, width))
