"""Measure one variant of a speech run on one split: losses and error rates by domain, and what went into it.

On validation all of its utterances are used: a calibration fits to training utterances.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoints import Artifact, plain_folder
from modularforge.assembly.assemble import assemble
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.evaluation.extras import Texts
from modularforge.observe.metrics import standing
from modularforge.pipeline import JobName
from modularforge.speech.costs import costs
from modularforge.speech.folder import load_speech
from modularforge.speech.model import SpeechModel
from modularforge.stages.evaluate_speech import measured_row, oracle_row
from modularforge.stages.speech import calibrate_speech
from modularforge.study.measure import Split
from modularforge.study.runs import StudyRun
from modularforge.study.study_file import NEEDS, Variant
from modularforge.tasks.speech import HeldOutSpeech, held_out_speech
from modularforge.training.distributed import default_device
from modularforge.training.job import Job
from modularforge.training.precision import measuring

KINDS = ("backbone", "dense", "joint", "experts", "assembled")
WITHOUT: dict[str, Any] = {"documents": {}, "flops_per_token": None}
"""What rows of text have besides, and those of speech have not."""


@dataclass
class SpeechBench:
    """One run and one split."""

    run: StudyRun
    split: Split
    limit: int
    texts: Texts = field(default_factory=dict)

    @cached_property
    def held_out(self) -> HeldOutSpeech:
        """The utterances of the split, the same for every variant."""
        return held_out_speech(self.run.config, self.run.corpus, self.split)

    def measure(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Rows by name (the empty name where there is but one), and what else is known of the variant."""
        _check(variant, self.texts)
        jobs = dict(parts)
        if variant.kind == "experts":
            return self._measure_experts(jobs)
        model, calibration, heard = self._model(variant, config, jobs), None, dict[str, Any]()
        if variant.options.calibrate:
            fresh, model = model, self._model(variant, config, jobs)
            job = Job("calibrate", config.calibration, config.training, unit="seconds")
            result, heard = calibrate_speech(model, config, self.run.corpus, job)
            model, calibration = (model if result.kept else fresh), result.facts
        row = self._row(model, [*jobs.values()])
        row["training_tokens"] = _sum(row["training_tokens"], heard.get("training_tokens", 0))
        return {"rows": {"": row}, "calibration": calibration}

    def _row(self, model: Any, jobs: list[Artifact]) -> dict[str, Any]:
        with measuring(self.run.config.training, default_device()):
            row, _, _ = measured_row(model, self.held_out, {}, default_device())
        return {**row, **costs(jobs), **WITHOUT}

    def _measure_experts(self, jobs: dict[str, Artifact]) -> dict[str, Any]:
        """Each expert alone, the best of them on the whole, and the oracle, which takes the best for each domain."""
        backbone = jobs.pop("backbone")
        rows = {name: self._row(self.run.backbone.expert(job), [backbone, job]) for name, job in jobs.items()}
        bound = {**oracle_row(rows), **costs([backbone, *jobs.values()]), **WITHOUT}
        return {"rows": {"best expert": min(rows.values(), key=standing), "oracle": bound}, "experts": rows}

    def _model(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> SpeechModel:
        if variant.kind != "assembled":
            return load_speech(parts[NEEDS[variant.kind] or "backbone"].local_folder())
        experts = [artifact for name, artifact in parts.items() if JobName.parse(name).index is not None]
        with tempfile.TemporaryDirectory() as scratch:
            assemble(config, parts["backbone"], experts, plain_folder(Path(scratch)))
            return load_speech(Path(scratch))


def _sum(first: int | None, more: int) -> int | None:
    return None if first is None else first + more


def _check(variant: Variant, texts: Texts) -> None:
    """Raise ConfigError for what only text has."""
    if variant.kind not in KINDS:
        raise ConfigError(
            f"variants.{variant.entry}.kind must be one of {', '.join(KINDS)} with task speech, but is {variant.kind}; "
            "leave it out"
        )
    options = variant.options
    for name in (name for name in ("removal", "without", "carry") if getattr(options, name)):
        raise ConfigError(f"variants.{variant.entry}.{name} must be false with task speech; remove it")
    if texts:
        raise ConfigError("texts must be left out with task speech, which measures recordings; remove them")
