"""A kind of expert as somebody else might write it: experts are the gains of the norms, and a model is their mean.

The gains of the layers learn first, then the last norm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoints import Artifact
from checkpoints.hashing import describe_file
from checkpoints.safetensors import WEIGHTS_NAME, read_spans
from modularforge.assembly.parts import Merged
from modularforge.assembly.plan import output_tensors, spans_of
from modularforge.assembly.values import values_of
from modularforge.experts.kind import ExpertJob, Kind
from modularforge.model import names
from modularforge.model.hub_config import CONFIG_NAME

WEIGHTS = "gains.safetensors"
GAINS = Kind("gains", "experts", WEIGHTS, "tests.gains_kind", "tests.gains_kind")
LAST_FROM = 4


def watch(_step: int) -> None:
    """For tests: the steps that begin."""


def prepare(expert: ExpertJob) -> Any:
    from modularforge.experts.trainable import ParameterGroup, Trainable

    model = expert.backbone.model().float().requires_grad_(False)
    gains = {name: weight for name, weight in model.named_parameters() if names.is_norm(name)}
    last = {names.FINAL_NORM: gains.pop(names.FINAL_NORM)}

    def before_step(step: int) -> None:
        watch(step)
        for parameters, learns in ((gains, step < LAST_FROM), (last, step >= LAST_FROM)):
            for weight in parameters.values():
                weight.requires_grad_(learns)

    groups = [ParameterGroup(gains), ParameterGroup(last, rate_factor=0.5)]
    return Trainable(model, expert.task.loss, groups, before_step)


def save(expert: ExpertJob, model: Any, folder: Path) -> dict[str, Any]:
    gains = {name: weight.detach().numpy() for name, weight in model.named_parameters() if names.is_norm(name)}
    save_file(gains, folder / WEIGHTS)
    return {"gains": len(gains)}


def load(backbone: Any, artifact: Artifact) -> Any:
    from safetensors.torch import load_file

    from modularforge.model.folder import fill

    return fill(backbone.model(), {**backbone.tensors, **load_file(artifact.local_file(WEIGHTS))})


def calibrates(model: Any, settings: Any) -> Mapping[str, Any]:
    return {names.FINAL_NORM: model.model.norm.weight}


def freezes(name: str) -> bool:
    return not names.is_norm(name)


def part_of(name: str) -> str:
    return "gains.safetensors" if names.is_norm(name) else "backbone.safetensors"


def merge(config: Any, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
    spans = [spans_of(expert, WEIGHTS) for expert in experts]
    means = {name: np.mean([values_of(own[name]) for own in spans], axis=0, dtype=np.float32) for name in spans[0]}
    save_file(means, scratch / "means.safetensors")
    found = read_spans(str(scratch / "means.safetensors"), describe_file(scratch / "means.safetensors").tensors)
    tensors = output_tensors({**spans_of(backbone, WEIGHTS_NAME), **found})
    values = backbone.read_json(CONFIG_NAME)
    facts = {"architecture": values["architectures"][0], "router": "none"}
    summary = f"A dense model with the mean gains of {len(experts)} experts."
    return Merged(tensors, part_of, {}, values, facts, summary, lambda _folder: {})
