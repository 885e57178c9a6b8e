"""The table of stages as data: where each writes, what it reads, and which settings its output depends on.

An artifact's identity is the fingerprint of (stage, those settings, the fingerprints of its inputs). A stage whose
artifact is committed under the same fingerprint is done; under another one it belongs to another config and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints import Artifact, find_artifact, paths
from checkpoints.errors import MissingArtifactError
from modularforge.config import TRAINED_ON_ALL, Config, ModelConfig
from modularforge.errors import MismatchError

Finder = Callable[[str], Artifact | None]
"""How an artifact is looked up by URL; the launcher looks up each only once for thousands of experts."""


@dataclass(frozen=True)
class Stage:
    """One row of the table; `{index}` in `folder` and `command` stands for an expert's index."""

    name: str
    folder: str
    settings: tuple[str, ...]
    inputs: tuple[str, ...]
    command: str


ARITHMETIC = ("training.beta1", "training.beta2", "training.clip_norm", "training.precision", "seed")
SCHEDULE = (
    "experts.steps",
    "experts.batch_size",
    "experts.accumulation_steps",
    "experts.peak_learning_rate",
    "experts.final_learning_rate_ratio",
    "experts.warmup_steps",
    "experts.weight_decay",
)
SHAPE = tuple(f"model.{name}" for name in ModelConfig.model_fields if name != "pretrained")
"""The model, wherever its files lie: a pretrained one is an input, known by its bytes."""
COUNTED = ("experts.counted_tokens", "experts.counted_pairs")
EXPERT = (*SCHEDULE, "experts.anchored", "experts.init", "experts.z_loss", "experts.statistics_tokens", *COUNTED)
JOINT = (
    *SCHEDULE,
    "experts.count",
    "experts.anchored",
    "experts.z_loss",
    "joint",
    "assembly.experts_per_token",
    "assembly.public_expert",
    *ARITHMETIC,
)
SOLVED = (
    "assembly.experts_per_token",
    "assembly.public_expert",
    "assembly.ridge_penalty",
    "assembly.router_temperature",
    "experts.anchored",
)
"""What a mixture depends on whose rows are solved by `data_stats`, whatever the run's own router is."""
EVIDENCE = ("assembly.experts_per_token", "assembly.public_expert", "assembly.token_pairs")
"""What a mixture depends on that routes by evidence, whatever the run's own router is."""
MIXED = (*SCHEDULE, "experts.count", "joint.batch_size", *ARITHMETIC)
"""What every job depends on that trains on all partitions at once."""
CHOSEN_FACT = "chosen_by_hand"  # in the manifest of an assembled model whose experts somebody chose
PREPARED = ("corpus", "partitions")
STANDS_FOR = {
    name: {f"{name}.peak_learning_rate": "experts.peak_learning_rate", f"{name}.batch_size": "joint.batch_size"}
    for name in (*TRAINED_ON_ALL, "btx")
}
"""By stage, its settings that outrank general ones. A stage's settings have the value that counts, under the general
name: whoever says it, the artifact is the same."""
CAME_LATER: dict[str, Any] = {
    "experts.counted_tokens": 20_000_000,
    "experts.counted_pairs": 1_000_000,
    "evaluation.general": None,
    "evaluation.chat": None,
}
"""Settings that stages learned after artifacts had been made without them, by dotted name, each with the value under
which a stage does what it did before. With that value they are no part of a stage's settings, so that the artifact that
was made without them keeps its fingerprint. Their default may be another value."""

OF_EVIDENCE = ("assembly.token_pairs", "assembly.width_multiple", "assembly.head_multiple")
"""Settings that came with the evidence router's second form. A model of its first form was another model, so for that
router they count with any value; for the other routers nothing has changed."""

STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", "{data}", ("data", "seed"), ("tokenizer",), "prepare-data"),
        Stage("partitions", "{data}/partitions", ("partition", "experts.count", "seed"), ("corpus",), "prepare-data"),
        Stage(
            "backbone",
            "backbone",
            (*SHAPE, "backbone", *COUNTED, *ARITHMETIC),
            ("corpus", "pretrained"),
            "train --only backbone",
        ),
        Stage(
            "expert",
            "experts/expert-{index}",
            (*EXPERT, *ARITHMETIC),
            ("backbone", "partition"),
            "train --only expert --index {index}",
        ),
        Stage(
            "dense",
            "baselines/dense",
            MIXED,
            ("corpus", "partitions", "backbone"),
            "train --only dense",
        ),
        Stage(
            "dense_wide",
            "baselines/dense_wide",
            (*MIXED, "assembly.experts_per_token"),
            ("corpus", "partitions", "backbone"),
            "train --only dense_wide",
        ),
        Stage("joint", "baselines/joint", JOINT, ("corpus", "partitions", "backbone"), "train --only joint"),
        Stage(
            "joint_evidence",
            "baselines/joint_evidence",
            (*MIXED, "joint.freeze_shared", "experts.anchored", *COUNTED, *EVIDENCE),
            ("corpus", "partitions", "backbone"),
            "train --only joint_evidence",
        ),
        Stage(
            "branch",
            "baselines/branches/branch-{index}",
            (*SCHEDULE, "experts.statistics_tokens", *ARITHMETIC),
            ("backbone", "partition"),
            "train --only branch --index {index}",
        ),
        Stage(
            "btx",
            "baselines/btx",
            (*MIXED, "btx.steps", "btx.trains", "joint.balance_loss", "experts.z_loss", *SOLVED),
            ("corpus", "partitions", "backbone", "branches"),
            "train --only btx",
        ),
        Stage("assembled", "assembled", ("assembly", "experts.anchored", "seed"), ("backbone", "experts"), "assemble"),
        Stage("calibrated", "calibrated", ("calibration", *ARITHMETIC), ("corpus", "assembled"), "assemble"),
        Stage("evaluation", "evaluation", ("evaluation", "seed"), ("corpus", "models"), "evaluate"),
    )
}


def stage_url(config: Config, name: str, index: int | None = None) -> str:
    """URL of a stage's artifact."""
    folder = STAGES[name].folder.format(data=config.data_url, index=index)
    return folder if name in PREPARED else paths.join(config.output_dir, folder)


def job_name(name: str, index: int | None = None) -> str:
    """Name of a training job in logs, metrics and checkpoints: `backbone`, `expert-3`."""
    return name if index is None else f"{name}-{index}"


def metrics_url(config: Config, job: str) -> str:
    """Where a training job writes its metrics."""
    return paths.join(config.output_dir, "metrics", f"{job}.jsonl")


def checkpoint_url(config: Config, job: str) -> str:
    """Where a training job keeps its resumable state."""
    return paths.join(config.output_dir, "checkpoints", job)


def stage_settings(config: Config, name: str) -> dict[str, Any]:
    """The settings that a stage's output depends on, by dotted name; see `CAME_LATER` for what is left out."""
    values = config.model_dump(mode="json")
    if name in PREPARED:
        values["seed"] = config.preparation_seed
    found: dict[str, Any] = {}
    for setting in STAGES[name].settings:
        found.update(_flatten(setting, _value(values, setting)))
    for own, general in STANDS_FOR.get(name, {}).items():
        value = _value(values, own)
        found.pop(own, None)
        found[general] = _value(values, general) if value is None else value
    if name == "assembled" and config.assembly.router != "evidence":
        found = {name: value for name, value in found.items() if name not in OF_EVIDENCE}
    return {name: value for name, value in found.items() if name not in CAME_LATER or CAME_LATER[name] != value}


def fingerprint(name: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Identity of an artifact, 32 hexadecimal digits."""
    content = json.dumps([name, settings, inputs], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def contents(artifact: Artifact) -> str:
    """Identity of the very bytes of an artifact, 32 hexadecimal digits: the same settings may have read other files."""
    hashes = {name: entry.sha256 for name, entry in artifact.manifest.files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Plan:
    """One artifact to be made: where, from which settings and inputs, and therefore its fingerprint."""

    stage: str
    url: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Identity of the artifact that this plan makes."""
        return fingerprint(self.stage, self.settings, self.inputs)


def plan_stage(
    config: Config,
    name: str,
    index: int | None = None,
    inputs: dict[str, str] | None = None,
    find: Finder = find_artifact,
) -> Plan:
    """What a stage will make; raises MissingArtifactError when an input is not there yet.

    `inputs` are given only for the evaluation, which reads whatever models there are.
    """
    found = input_fingerprints(config, name, index, find) if inputs is None else inputs
    return Plan(name, stage_url(config, name, index), stage_settings(config, name), found)


def finished(plan: Plan, find: Finder = find_artifact) -> Artifact | None:
    """The committed artifact of this plan, or None; raises MismatchError when another config's lies there."""
    artifact = find(plan.url)
    if artifact is None:
        _require_free_place(plan.url)
    if artifact is None or artifact.manifest.fingerprint == plan.fingerprint:
        return artifact
    if is_outgrown(plan, artifact):
        return None
    raise MismatchError(
        f"{plan.url} must have been made with these settings and inputs, but {_difference(plan, artifact)}; "
        "use another --output-dir, or delete that folder to make it again"
    )


def _require_free_place(url: str) -> None:
    """Refuse a folder of somebody's files before the work, not when its result finds no place."""
    path = paths.local_path(url) if paths.is_local(url) else None
    if path is not None and path.exists() and (path.is_file() or any(path.iterdir())):
        raise MismatchError(
            f"{url} must be free or a committed artifact, but it is {'a file' if path.is_file() else 'a folder'} "
            "without a manifest; move it away, or use another --output-dir"
        )


def is_outgrown(plan: Plan, artifact: Artifact) -> bool:
    """Whether an assembled model has the settings and the parts of this plan, but fewer experts."""
    old = artifact.manifest
    return plan.stage == "assembled" and old.settings == plan.settings and old.inputs.items() < plan.inputs.items()


def require(config: Config, name: str, index: int | None = None, find: Finder = find_artifact) -> Artifact:
    """The artifact of an earlier stage, made with these settings; raises MissingArtifactError with the command."""
    artifact = finished(plan_stage(config, name, index, find=find), find)
    if artifact is None:
        command = STAGES[name].command.format(index=index)
        raise MissingArtifactError(
            f"{job_name(name, index)} must be finished first, but there is none at {stage_url(config, name, index)}; "
            f"run `modularforge {command}` with the same --config, --output-dir and --data-dir"
        )
    return artifact


def chosen_experts(config: Config, find: Finder = find_artifact) -> dict[int, Artifact]:
    """The experts of the assembled model, by index: those that a committed one names, else all that are finished.

    A model whose experts were chosen by hand (`modularforge experts`) is left as it is.

    Raises MissingArtifactError with the missing ones when fewer than `cluster.min_experts` are finished.
    """
    plans = {index: plan_stage(config, "expert", index, find=find) for index in range(config.experts.count)}
    ready = {index: artifact for index, plan in plans.items() if (artifact := finished(plan, find))}
    if len(ready) < config.needed_experts:
        missing = ", ".join(str(index) for index in plans if index not in ready)
        raise MissingArtifactError(
            f"assembly needs {config.needed_experts} of {config.experts.count} experts, but {len(ready)} are finished "
            f"(missing: {missing}); train them, or lower cluster.min_experts to go on without"
        )
    assembled = find(stage_url(config, "assembled"))
    if assembled is None:
        return ready
    inputs = assembled.manifest.inputs
    named = {
        index: artifact
        for index, artifact in ready.items()
        if inputs.get(f"expert-{index}") == artifact.manifest.fingerprint
    }
    is_whole = len(named) == sum(key != "backbone" for key in inputs)
    is_enough = len(named) >= config.needed_experts or bool(assembled.manifest.facts.get(CHOSEN_FACT))
    return named if is_whole and is_enough else ready


def input_fingerprints(
    config: Config, name: str, index: int | None = None, find: Finder = find_artifact
) -> dict[str, str]:
    """Fingerprints of what a stage reads, from their manifests; an expert knows only its own partition."""
    found: dict[str, str] = {}
    for needed in STAGES[name].inputs:
        if needed == "partition":
            files = require(config, "partitions", find=find).manifest.files
            found[needed] = files[f"partition-{index}.tokens.bin"].sha256[:32]
        elif needed == "experts":
            for expert, artifact in chosen_experts(config, find).items():
                found[f"expert-{expert}"] = artifact.manifest.fingerprint
        elif needed == "branches":
            for branch in range(config.experts.count):
                found[f"branch-{branch}"] = require(config, "branch", branch, find).manifest.fingerprint
        elif needed in ("tokenizer", "pretrained"):
            found.update(_pretrained_input(config, needed))
        elif needed == "corpus":
            found[needed] = contents(require(config, needed, find=find))
        else:
            found[needed] = require(config, needed, find=find).manifest.fingerprint
    return found


def _pretrained_input(config: Config, needed: str) -> dict[str, str]:
    """Identity of the pretrained model or of its tokenizer; nothing where the run starts from random weights."""
    if config.model.pretrained is None:
        return {}
    from modularforge.pretrained.fetch import model_identity, tokenizer_identity

    identity = tokenizer_identity if needed == "tokenizer" else model_identity
    return {needed: identity(config.model.pretrained)}


def _difference(plan: Plan, artifact: Artifact) -> str:
    """Say which settings or inputs differ, the old value after the new one."""
    old, new = artifact.manifest.settings, plan.settings
    changed = [
        f"{key} is {new.get(key)!r:.60} here and {old.get(key)!r:.60} there"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    inputs = artifact.manifest.inputs
    changed += [
        f"it was made from another {key}"
        for key in sorted({*plan.inputs, *inputs})
        if plan.inputs.get(key) != inputs.get(key)
    ]
    more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
    return "; ".join(changed[:4]) + more


def _value(values: dict[str, Any], setting: str) -> Any:
    value: Any = values
    for part in setting.split("."):
        value = value[part]
    return value


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in _flatten(f"{prefix}.{key}", item).items()}
    return {prefix: value}
