"""How steering experts become one model: vectors and gate rows stacked, scales kept, a router solved from sums.

Works on committed artifacts of any store and needs no torch.
"""

# D width  E vectors of all experts  K experts  L sites

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from checkpoints import Artifact
from checkpoints.hashing import describe_file
from checkpoints.safetensors import WEIGHTS_NAME, read_spans
from modularforge.assembly.parts import Merged
from modularforge.assembly.plan import output_tensors, spans_of
from modularforge.config import Config
from modularforge.errors import ConfigError, MismatchError
from modularforge.experts.steering import FROZEN_FACT, STEERING_NAME, UTTERANCES_NAME
from modularforge.facts import fact
from modularforge.model.hub_config import CONFIG_NAME
from modularforge.routing.solvers import means, ridge
from modularforge.routing.statistics import STATISTICS_NAME, RouterStatistics, load_statistics

Arrays = dict[str, NDArray[np.float32]]
ROWS = ".lora_A"
"""Of each expert's adapters, whose rows follow each other; all else of experts does along the second axis."""
ROUTERS = ("ridge", "means", "uniform")


def freezes(name: str) -> bool:
    """All of the backbone's tensors: the projector, and random frozen parts."""
    return True


def part_of(name: str) -> str:
    """A file for each part of the model."""
    return f"{name.partition('.')[0]}.safetensors"


def merge(config: Config, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
    """The backbone with all experts; raises ConfigError or MismatchError when they cannot be one model."""
    if config.assembly.router not in ROUTERS:
        raise ConfigError(
            f"assembly.router must be one of {', '.join(ROUTERS)} for experts of kind steering, but is "
            f"{config.assembly.router}; change it"
        )
    shape = _common_shape(backbone, experts)
    stacked = stack([load_file(expert.local_file(STEERING_NAME)) for expert in experts])
    if len(experts) > 1:
        stacked |= router(config, experts)
    path = scratch / STEERING_NAME
    save_file({name: np.ascontiguousarray(value) for name, value in stacked.items()}, path)
    spans = {**spans_of(backbone, WEIGHTS_NAME), **read_spans(str(path), describe_file(path).tensors)}
    steering = {**shape["steering"], "experts": len(experts), "routing": config.steering.routing}
    values = _config(backbone, {**shape, "steering": steering})
    facts = {
        "architecture": values["architectures"][0],
        "library": "modularforge",
        "router": config.assembly.router,
        "experts": len(experts),
        "experts_per_token": 1,  # as many must stay; all of them weigh at every frame
        "public_expert": False,
        "parameters": sum(value.size for value in stacked.values()),
        FROZEN_FACT: fact(backbone, FROZEN_FACT),
    }
    each = f"{steering['vectors']} steering vectors at each of {steering['sites']} places"
    each = f"adapters of rank {shape['rank']} in {steering['sites']} layers" if "rank" in shape else each
    summary = (
        f"A speech model: {len(experts)} experts of {each} in a frozen speech encoder, a projector, and a frozen "
        "language model."
    )
    return Merged(output_tensors(spans), part_of, {}, values, facts, summary, lambda _folder: {})


def stack(experts: Sequence[Mapping[str, NDArray[np.float32]]]) -> Arrays:
    """All experts' vectors [L, E, D], gates, and scales [L, K], or adapters A [K R, I] and B [O, K R], by name."""
    return {
        name: np.concatenate([expert[name] for expert in experts], axis=0 if name.endswith(ROWS) else 1)
        for name in experts[0]
    }


def router(config: Config, experts: Sequence[Artifact]) -> Arrays:
    """Rows [L, K, D] and offsets [L, K] that say from a frame, or an utterance's mean, whose it is."""
    name = UTTERANCES_NAME if config.steering.routing == "utterance" else STATISTICS_NAME
    statistics = [load_statistics(expert.local_file(name)) for expert in experts]
    rows_LKD = np.stack([_rows(config, statistics, site) for site in range(len(statistics[0].layers))])
    offsets_LK = np.zeros(rows_LKD.shape[:2], np.float32)
    return {"steering.router_weight": rows_LKD.astype(np.float32), "steering.router_bias": offsets_LK}


def _rows(config: Config, statistics: Sequence[RouterStatistics], site: int) -> Any:
    sums, settings = [item.layers[site] for item in statistics], config.assembly
    if settings.router == "uniform":
        return np.zeros((len(sums), len(sums[0].sum_D)))
    if settings.router == "ridge":
        return ridge(sums, settings.ridge_penalty, settings.router_temperature)
    return means(sums, settings.router_temperature)


def _common_shape(backbone: Artifact, experts: Sequence[Artifact]) -> dict[str, Any]:
    """What of all experts' shape differs from the backbone's; raises MismatchError where one has another, or other
    frozen parts."""
    shape = {name: fact(experts[0], name) for name in ("variant", "steering")}
    shape |= {"rank": fact(experts[0], "rank")} if shape["variant"] == "lora" else {}
    expected = {**shape, FROZEN_FACT: fact(backbone, FROZEN_FACT)}
    for expert in experts:
        for name, value in expected.items():
            if (found := fact(expert, name)) != value:
                raise MismatchError(
                    f"{expert.url} must have the {name} of the others, {value}, but has {found}; train it with the "
                    "same settings on this backbone"
                )
    return shape


def _config(backbone: Artifact, shape: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = backbone.read_json(CONFIG_NAME)
    return {**values, "shape": {**values["shape"], **shape}}
