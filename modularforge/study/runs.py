"""The runs of a study: one normal run folder per seed and recipe; what another has made is copied, not made again.

Data and partitions lie beside the runs, one folder for each way of dividing the documents; all hold the same corpus.

On a cluster each run is handed to `python -m launcher --cluster` as the run that it is. Data and partitions are made
here, because runs share them. Runs that need a backbone of their own go first; the others copy it from them, and
whatever else they share, and follow. What the launcher made is then found like anything else, so that only measuring
is left to this process.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from checkpoints import Artifact, MissingArtifactError, find_artifact, paths
from checkpoints.copying import copy_artifact
from checkpoints.screen import shown_command
from modularforge.config import Config
from modularforge.config_files import load_config, to_yaml
from modularforge.errors import ConfigError, TrainingError
from modularforge.log import logger
from modularforge.pipeline import NEVER, SHARED_WORK, STAGES, JobName, Plan, fingerprint, stage_settings, stage_url
from modularforge.provenance import save_settings
from modularforge.run import Run
from modularforge.stage_outputs import Backbone, Corpus
from modularforge.study.study_file import NEEDS, StudyFile, Variant

SETTINGS_NAME = "launch.yaml"
BASELINE_OF = {name: stage.baseline for name, stage in STAGES.items() if stage.baseline not in (None, NEVER)}
# The router of a BTX merge is trained here, from branches that the cluster trained.
BASELINE_OF |= {"btx": "btx"}


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
        """The data folder of this way of preparing and dividing the documents."""
        digest = fingerprint("partitions", stage_settings(config, "partition"), {})[:8]
        name = f"{config.partition.method}-{digest}"
        corpus = stage_settings(config, "prepare-data")
        if corpus != self._first_corpus:
            name += f"-{fingerprint('corpus', corpus, {})[:8]}"
        return paths.join(self.root, "data", name)

    @cached_property
    def _first_corpus(self) -> dict[str, Any]:
        """What the data of the first recipe depend on; those of others have a name of their own where it differs."""
        recipe = {**self.study.set, **next(iter(self.study.recipes.values()))}
        seed = {"seed": self.study.seeds[0], "data_seed": self.study.seeds[0]}
        settings: list[str | tuple[str, Any]] = [*recipe.items(), *seed.items(), *self.changes]
        return stage_settings(load_config(self.study.base, settings, smoke_test=self.smoke_test), "prepare-data")


@dataclass(frozen=True)
class StudyRun:
    """One run folder; `others` are the runs of the same seed, whose artifacts it takes when they are what it needs."""

    config: Config
    others: list[Config]
    obtained: dict[JobName, Artifact] = field(default_factory=dict)

    @cached_property
    def run(self) -> Run:
        """The run itself."""
        return Run(self.config)

    def obtain(self, stage: str, index: int | None = None) -> Artifact:
        """The artifact of a stage: found here, copied from another run, or made now."""
        if (name := JobName(stage, index)) not in self.obtained:
            self.obtained[name] = self._obtain(stage, index)
        return self.obtained[name]

    def _obtain(self, stage: str, index: int | None) -> Artifact:
        for needed in STAGES[stage].inputs_of(self.config):
            if needed in STAGES and needed not in SHARED_WORK and not STAGES[needed].is_off(self.config):
                self.obtain_each(needed)
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
            is_trained = stage.phase is not None or stage.round
            if is_trained and stage.name != "calibrate" and stage.round < self.config.experts.rounds:
                for index in stage.indices(self.config):
                    with contextlib.suppress(MissingArtifactError):
                        self._take(stage.name, index)

    def obtain_each(self, stage: str) -> list[Artifact]:
        """The artifacts of all experts, or of all branches."""
        return [self.obtain(stage, index) for index in STAGES[stage].indices(self.config)]

    @cached_property
    def corpus(self) -> Corpus:
        """The prepared data."""
        return Corpus(self.obtain("prepare-data"), self.config.reads_documents)

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


def train_on_cluster(runs: Runs, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Submit what the variants need, in two waves, and wait for it; raises TrainingError when a run failed."""
    waves: tuple[list[StudyRun], list[StudyRun]] = ([], [])
    for seed in seeds:
        backbones: set[str] = set()
        for recipe in dict.fromkeys(variant.recipe for variant in variants if seed in variant.seeds):
            run = runs.run(seed, recipe)
            backbone = fingerprint("backbone", stage_settings(run.config, "backbone"), {})
            waves[backbone in backbones].append(run)
            backbones.add(backbone)
    for wave in waves:
        launched = [_launch(run, _baselines(variants, run)) for run in wave]
        failed = [url for url in launched if not _launcher("wait", url)]
        if failed:
            command = shown_command("python", "-m", "launcher", "status", "--config", failed[0])
            raise TrainingError(
                f"all runs of the study must end well, but these did not: {', '.join(failed)}; see `{command}`, and "
                "repeat the command"
            )


def _launch(run: StudyRun, baselines: list[str]) -> str:
    """Submit one run; returns the URL of its settings."""
    run.obtain("partition")
    run.take_all()
    evaluation = run.config.evaluation.model_copy(update={"baselines": baselines})
    config: Config = run.config.model_copy(update={"evaluation": evaluation})
    url = paths.join(config.output_dir, SETTINGS_NAME)
    paths.replace_bytes(url, to_yaml(config).encode())
    logger.info("submitting %s", config.output_dir)
    if not _launcher("--cluster", url):
        raise TrainingError(f"{config.output_dir} must be submitted, but the launcher failed; see its message above")
    return url


def _baselines(variants: Sequence[Variant], run: StudyRun) -> list[str]:
    """The baselines that the variants of a run need, as `evaluation.baselines` names them."""
    recipe = run.config.output_dir.rstrip("/").rsplit("/", 1)[-1]
    stages = {NEEDS[variant.kind] for variant in variants if variant.recipe == recipe}
    return list(dict.fromkeys(name for stage, name in BASELINE_OF.items() if stage in stages))


def _launcher(command: str, settings_url: str) -> bool:
    """Run a command of the launcher; whether it ended well."""
    words = [sys.executable, "-m", "launcher", command, "--config", settings_url]
    return subprocess.run(words, check=False).returncode == 0
