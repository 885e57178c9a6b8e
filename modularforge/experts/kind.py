"""What a kind of expert answers: which parameters learn, and how experts become one model.

A kind is one folder and one row: a `Kind` with the names of two modules, of which the second needs no torch. Their
functions bear the names of the methods here, which say what they answer. A kind knows no task by name: its jobs get
one. It is found by name in a table that a Python entry point of the group `modularforge.experts` can extend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from checkpoints import Artifact
from modularforge.errors import ConfigError, MismatchError
from modularforge.facts import fact
from modularforge.plugins import find

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from modularforge.assembly.parts import Merged
    from modularforge.config import CalibrationConfig, Config
    from modularforge.experts.trainable import Trainable
    from modularforge.model.backbone import Decoder
    from modularforge.stage_outputs import Backbone
    from modularforge.tasks.task import Examples, Task
    from modularforge.training.distributed import World

GROUP = "modularforge.experts"
OWN = {
    "ffn": "modularforge.experts.ffn:FFN",
    "lora": "modularforge.experts.lora:LORA",
    "steering": "modularforge.experts.steering:STEERING",
}
KIND_FACT = "expert_kind"
"""In the manifest of an expert and of an assembled model; those of earlier versions have none and are of kind `ffn`."""


@dataclass(frozen=True)
class ExpertJob:
    """One expert's job: all that it may read, which is nothing of any other expert; and the ranks that share it."""

    config: Config
    index: int
    backbone: Backbone
    task: Task
    examples: Examples
    device: torch.device
    world: World | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of expert; functions with a `Config` read their sections of it alone.

    `settings` is its section of the configuration, all of which is identity, less what is listed as without effect.
    `weights_name` is the file of an expert that tells it from every other. `training` is the module that trains and
    runs experts, `merging` the one that makes them one model.
    """

    name: str
    settings: str
    weights_name: str
    training: str
    merging: str

    def prepare(self, expert: ExpertJob) -> Trainable:
        """What the job trains: all of its parameters in groups, its loss, and what it does before each step.

        Everything random follows from torch's global generator, which is seeded by the expert's index.
        """
        return cast("Trainable", import_module(self.training).prepare(expert))

    def save(self, expert: ExpertJob, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Write a trained expert, and what routers are solved from; returns facts of this kind for the manifest."""
        return cast("dict[str, Any]", import_module(self.training).save(expert, model, folder))

    def load(self, backbone: Backbone, artifact: Artifact) -> Decoder:
        """How one expert runs alone."""
        return cast("Decoder", import_module(self.training).load(backbone, artifact))

    def soup(self, backbone: Backbone, experts: Sequence[Artifact]) -> Decoder:
        """The mean of what experts trained, which assembly is compared with; raises ConfigError where kinds have none.

        The function may be left out.
        """
        module = import_module(self.training)
        if not hasattr(module, "soup"):
            raise ConfigError(
                f"evaluation.baselines must not name soup for experts of kind {self.name}, which have no mean; leave it"
            )
        return cast("Decoder", module.soup(backbone, experts))

    def calibrates(self, model: Decoder, settings: CalibrationConfig) -> Mapping[str, nn.Parameter]:
        """The parameters of an assembled model that a calibration may touch, by name; raises ConfigError for none."""
        return cast("Mapping[str, nn.Parameter]", import_module(self.training).calibrates(model, settings))

    def freezes(self, name: str) -> bool:
        """Whether a tensor of the backbone stays as it is in every expert; its hash is recorded, and then compared."""
        return bool(import_module(self.merging).freezes(name))

    def merge(self, config: Config, backbone: Artifact, experts: Sequence[Artifact], scratch: Path) -> Merged:
        """How these become one model: a plan over committed bytes; few new values are written to files in `scratch`.

        Raises ConfigError or MismatchError when they cannot.
        """
        return cast("Merged", import_module(self.merging).merge(config, backbone, experts, scratch))

    def part_of(self, name: str) -> str:
        """The weight file that a tensor of the assembled model belongs to, when every part has one."""
        return str(import_module(self.merging).part_of(name))


def find_kind(name: str) -> Kind:
    """The kind of this name; raises ConfigError with the names that there are."""
    kind: Kind = find(GROUP, OWN, name, "a kind of expert")
    return kind


def kind_of(config: Config) -> Kind:
    """The kind of a run's experts, `experts.kind`."""
    return find_kind(config.experts.kind)


def kind_of_artifact(artifact: Artifact) -> Kind:
    """The kind of a committed expert, or of the experts of an assembled model."""
    return find_kind(fact(artifact, KIND_FACT, "ffn"))


def common_kind(config: Config, experts: Sequence[Artifact]) -> Kind:
    """The one kind of all these experts; raises MismatchError when there are several."""
    found = {fact(expert, KIND_FACT, "ffn"): expert.url for expert in experts}
    if len(found) > 1:
        listed = ", ".join(f"{url} is {name}" for name, url in sorted(found.items()))
        raise MismatchError(f"experts of one model must be of one kind, but {listed}; assemble those of one kind")
    return find_kind(next(iter(found))) if found else kind_of(config)


def frozen_hashes(kind: Kind, backbone: Artifact, name: str) -> dict[str, str]:
    """Hashes of the tensors in the backbone's file `name` that this kind's experts leave as they are."""
    return {tensor: digest for tensor, digest in backbone.entry(name).tensors.items() if kind.freezes(tensor)}
