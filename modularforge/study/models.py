"""The model of a variant, in memory: what the stages trained, put together as the variant's settings say."""

from __future__ import annotations

import tempfile
from pathlib import Path

from checkpoints import Artifact, plain_folder
from modularforge.artifacts import derived_seed
from modularforge.assembly.assemble import assemble
from modularforge.calibration.calibrator import calibrate, even_mixture, split_documents
from modularforge.config import TRAINED_ON_ALL, Config
from modularforge.errors import DataError
from modularforge.evaluation.btx import build_btx
from modularforge.evaluation.soup import build_soup
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model
from modularforge.study.runs import StudyRun
from modularforge.study.study_file import Variant
from modularforge.training.distributed import default_device
from modularforge.training.job import Job

NEEDS: dict[str, str | None] = {
    "backbone": None,
    **{name: name for name in TRAINED_ON_ALL},
    "btx": "branch",
    "btx_trained": "btx",
    "soup": "expert",
    "experts": "expert",
    "ensemble_uniform": "expert",
    "ensemble_posterior": "expert",
    "assembled": "expert",
}


def needed_artifacts(run: StudyRun, variant: Variant) -> dict[str, Artifact]:
    """What a variant is made of besides the data, by name; trains what is missing."""
    found = {"backbone": run.backbone.artifact}
    stage = NEEDS[variant.kind]
    if stage in ("expert", "branch"):
        found |= {f"{stage}-{index}": artifact for index, artifact in enumerate(run.obtain_each(stage))}
    elif stage is not None:
        found[stage] = run.obtain(stage)
    return found


def build_model(run: StudyRun, config: Config, variant: Variant, parts: dict[str, Artifact]) -> Decoder:
    """The model of a variant that is one model; `config` holds the variant's settings, `parts` its artifacts."""
    members = [artifact for name, artifact in parts.items() if name.startswith(("expert-", "branch-"))]
    if variant.kind == "assembled":
        return _assembled(config, parts["backbone"], members)
    if variant.kind == "btx":
        return build_btx(config, run.backbone, members)
    if variant.kind == "soup":
        return build_soup(run.backbone, members)
    return load_model(parts[NEEDS[variant.kind] or "backbone"].local_folder())


def _assembled(config: Config, backbone: Artifact, experts: list[Artifact]) -> Decoder:
    """The assembler's own output, through a scratch folder that is gone afterwards: nothing can differ from it."""
    with tempfile.TemporaryDirectory() as scratch:
        assemble(config, backbone, experts, plain_folder(Path(scratch)))
        return load_model(Path(scratch))


def calibrate_model(run: StudyRun, config: Config, model: Decoder, fresh: Decoder) -> tuple[Decoder, dict[str, float]]:
    """Calibrate `model` and return it, or `fresh`, which is the same untouched, when it did not get better."""
    corpus = run.corpus
    fit_half, decide_half = split_documents(corpus.tokens("validation"), corpus.labels)
    if not fit_half:
        raise DataError("calibration needs two validation documents of a domain, but there are fewer; add some")
    job = Job("calibration", config.calibration, config.training)
    seed = derived_seed(config.seed, "calibration order")
    model = model.to(default_device())
    result = calibrate(model, config, even_mixture(fit_half), decide_half, corpus.byte_lengths, job, seed)
    facts = {"kept": result.kept, "loss_before": result.before, "loss_after": result.after}
    return (model if result.kept else fresh), facts
