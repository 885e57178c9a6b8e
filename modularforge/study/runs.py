"""The runs of a study: one normal run folder per seed and recipe; what another has made is copied, not made again.

Data and partitions lie beside the runs, one folder for each way of dividing the documents; all hold the same corpus.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from checkpoints import Artifact, MissingArtifactError, find_artifact, paths
from checkpoints.copying import copy_artifact
from modularforge.artifacts import Backbone, Corpus
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.log import logger
from modularforge.pipeline import MADE_BY, STAGES, JobName, Plan, fingerprint, stage_settings, stage_url
from modularforge.provenance import save_settings
from modularforge.run import Run
from modularforge.settings import load_config
from modularforge.study.study_file import StudyFile


@dataclass(frozen=True)
class Runs:
    """All runs of a study; `smoke_test` makes them tiny, `changes` are `key=value` texts that outrank the file."""

    study: StudyFile
    smoke_test: bool = False
    changes: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """Where the study lies."""
        return self.study.output_dir.rstrip("/") + ("-smoke-test" if self.smoke_test else "")

    def config(self, seed: int, recipe: str, settings: Mapping[str, Any] | None = None) -> Config:
        """The settings of one run, with a variant's on top; raises ConfigError."""
        chosen = {**self.study.set, **self.study.recipes[recipe], **(settings or {})}
        takes_all = chosen.get("assembly.experts_per_token") == "all"
        if takes_all:
            chosen["assembly.experts_per_token"] = 1
        chosen |= {"seed": seed, "data_seed": self.study.seeds[0]}
        try:
            config = load_config(
                self.study.base,
                [*chosen.items(), *self.changes],
                smoke_test=self.smoke_test,
                output_dir=paths.join(self.root, f"seed-{seed}", recipe),
            )
        except ConfigError as error:
            raise ConfigError(f"recipe {recipe} with {dict(settings or {})}: {error}") from error
        if takes_all:
            every = config.assembly.model_copy(update={"experts_per_token": config.assembled_experts})
            config = config.model_copy(update={"assembly": every})
        return config.model_copy(update={"data_dir": self._data_url(config)})

    def run(self, seed: int, recipe: str) -> StudyRun:
        """One run."""
        config = self.config(seed, recipe)
        others = [self.config(seed, name) for name in self.study.recipes if name != recipe]
        return StudyRun(config, others)

    def _data_url(self, config: Config) -> str:
        """The data folder of this way of dividing the documents."""
        digest = fingerprint("partitions", stage_settings(config, "partitions"), {})[:8]
        return paths.join(self.root, "data", f"{config.partition.method}-{digest}")


@dataclass(frozen=True)
class StudyRun:
    """One run folder; `others` are the runs of the same seed, whose artifacts it takes when they are what it needs."""

    config: Config
    others: list[Config]

    @cached_property
    def run(self) -> Run:
        """The run itself."""
        return Run(self.config)

    def obtain(self, stage: str, index: int | None = None) -> Artifact:
        """The artifact of a stage: found here, copied from another run, or made now."""
        for needed in STAGES[stage].inputs:
            if (name := MADE_BY.get(needed, needed)) in STAGES:
                self.obtain_each(name)
        plan = self.run.plan(stage, index)
        artifact = self.run.finished(plan) or self._copied(plan, stage, index)
        if artifact is None:
            save_settings(self.config)
            logger.info("%s: %s", self.config.output_dir, JobName(stage, index))
            self.run.make(stage, index)
            artifact = self.run.made(stage, index)
        return artifact

    def take_all(self) -> None:
        """Copy everything that another run has and this one would make alike; nothing is trained."""
        for stage in STAGES.values():
            if stage.phase is not None and stage.name != "calibrated":
                for index in stage.indices(self.config):
                    with contextlib.suppress(MissingArtifactError):
                        self._take(stage.name, index)

    def obtain_each(self, stage: str) -> list[Artifact]:
        """The artifacts of all experts, or of all branches."""
        return [self.obtain(stage, index) for index in STAGES[stage].indices(self.config)]

    @cached_property
    def corpus(self) -> Corpus:
        """The prepared data."""
        return Corpus(self.obtain("corpus"))

    @cached_property
    def backbone(self) -> Backbone:
        """The trained backbone."""
        return Backbone(self.obtain("backbone"))

    def _take(self, stage: str, index: int | None = None) -> None:
        plan = self.run.plan(stage, index)
        if not self.run.finished(plan):
            self._copied(plan, stage, index)

    def _copied(self, plan: Plan, stage: str, index: int | None) -> Artifact | None:
        for other in self.others:
            artifact = find_artifact(stage_url(other, stage, index))
            if artifact and artifact.manifest.fingerprint == plan.fingerprint:
                logger.info("%s is taken from %s", plan.url, artifact.url)
                copy_artifact(artifact, plan.url, lambda _: None)
                return self.run.made(stage, index)
        return None
