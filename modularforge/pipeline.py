"""The table of stages: one row each says where it writes, what it reads, what its output depends on, and what makes it.

An artifact's identity is the fingerprint of (stage, its settings, the fingerprints of its inputs). A stage whose
artifact is committed under the same fingerprint is done; under another one it belongs to another config and is refused.
Command line, launcher, status, evaluation and reports are loops over these rows. `Run` finds the artifacts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

from checkpoints import Artifact, paths
from modularforge.config import (
    GONE_FROM_ROPE,
    MOST_ROUNDS,
    MOST_WHOLE_CORPUS,
    TRAINED_ON_ALL,
    Config,
    PhaseConfig,
)
from modularforge.errors import ConfigError
from modularforge.experts.kind import kind_of

NEVER = "never"  # `Stage.baseline` of what no run makes by itself, only a study
UNTRAINED_BASELINES = ("soup",)  # made where they are measured, so that no row makes them
EVERY = "*"


@dataclass(frozen=True)
class Stage:
    """One row. Its `name` is that of its job, its task, its log and its command.

    `sections` are the settings that its output depends on, all of them but those in `WITHOUT_EFFECT`; `also` single
    ones of other sections. `{index}` in `folder` stands for an expert's index, `{data}` for the prepared data.
    `inputs` are rows, and what no row makes (`Run`). Of the partitions, and of indexed rows, an indexed row reads its
    own; any other reads all.
    """

    name: str
    folder: str
    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    run: str
    """`module:function`, called with the run, and with the index where there is one artifact for each partition."""
    also: tuple[str, ...] = ("seed",)
    artifact: str = ""
    """What manifests call what it makes, and tables its model, where that is not the stage's name."""
    within: str = ""
    """The stage whose process makes it too, before or after, where it has no job of its own."""
    first: str = ""
    """The stage whose process makes it where that one is wanted, because it reads it before `within` does."""
    apart: str = ""
    """A setting with which it has a job of its own in spite of `within`."""
    phase: Callable[[Config], PhaseConfig] | None = None
    """How it trains; None trains nothing."""
    nodes: str = "other"
    """The section of `cluster` that says what its job asks for."""
    baseline: str | None = None
    """It is wanted when `evaluation.baselines` names this; None is always."""
    needs: str = ""
    """A setting without which it is not wanted."""
    is_measured: bool = True
    """Its models are measured by the evaluation."""
    schedule: str = ""
    """The section of settings that says how many steps it trains; empty for what trains nothing."""
    panel: str = ""
    """Where its curves are drawn; empty draws none."""
    colour: str = ""
    """Of its curves and bars; experts and branches have one each."""
    count: str = "experts.count"
    """The setting that says how many there are of a row that is indexed."""
    copies: int = 0
    """How many steps of cleaning before it look at the whole corpus; it is wanted where there are so many."""
    round: int = 0
    """The round of the experts' training, but the last, that it is of; it is wanted where there are more rounds."""

    @property
    def is_indexed(self) -> bool:
        """Whether there is one artifact for each partition, or for each share of the work."""
        return "{index}" in self.folder

    @property
    def is_of_partitions(self) -> bool:
        """Whether there is one artifact for each partition."""
        return self.is_indexed and self.count == "experts.count"

    @property
    def kind(self) -> str:
        """Of its artifact: in its manifest, its fingerprint, those of what reads it, and in tables of models."""
        return self.artifact or self.name

    @property
    def job(self) -> str:
        """The job that makes it."""
        return self.within or self.name

    def job_in(self, config: Config) -> str:
        """The job that makes it in a run with these settings."""
        if self.apart and attrgetter(self.apart)(config):
            return self.name
        return self.first if self.first and STAGES[self.first].is_wanted(config) else self.job

    def is_off(self, config: Config) -> bool:
        """Whether the setting without which there is nothing to make is not given."""
        is_needless = bool(self.needs) and not attrgetter(self.needs)(config)
        return is_needless or self.copies > config.whole_corpus_steps

    def is_wanted(self, config: Config) -> bool:
        """Whether a run with these settings makes it."""
        if self.is_off(config):
            return False
        is_late = self.round >= config.experts.rounds
        return not is_late and (self.baseline is None or self.baseline in config.evaluation.baselines)

    def inputs_of(self, config: Config) -> tuple[str, ...]:
        """What it reads in such a run: the last round of experts also what those before it made."""
        before = config.experts.rounds - 1 if self.name == "expert" else 0
        return self.inputs + (made_in_round(before) if before else ())

    def function(self, task: str = "text") -> Callable[..., Any]:
        """What makes it for a task; imported only here, because it loads torch."""
        module, _, name = MADE_FOR.get(task, {}).get(self.name, self.run).partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        number = self.round or self.copies
        return partial(found, number=number) if number else found

    def indices(self, config: Config) -> list[int | None]:
        """One index for each of its artifacts."""
        return list(range(self.number(config))) if self.is_indexed else [None]

    def number(self, config: Config) -> int:
        """How many artifacts it has."""
        return int(attrgetter(self.count)(config) or 0) if self.is_indexed else 1


MAKERS = "modularforge.stages"
PREPARE_TASKS, CLUSTERING_TASKS, SHARE = "cluster.prepare_tasks", "clustering_tasks", "share"
CLEANING_TASKS = "cleaning_tasks"
SHARED_BY_ALL = ("prepare-data", "partition", "backbone")
CLEANED_FROM = tuple(
    f"data.{name}"
    for name in ("sources", "clean", "min_article_length", "max_documents_per_source", "heldout_fraction")
)
ROUTED = ("assembly.experts_per_token", "assembly.public_expert")
SOLVED = (*ROUTED, "assembly.ridge_penalty", "assembly.router_temperature")
OUTER = ("experts.outer.rate", "experts.outer.momentum")
COUNTED = ("experts.counted_tokens", "experts.counted_pairs")
GATHERED = ("experts.statistics", "experts.statistics_tokens")


def _baseline(name: Any, also: tuple[str, ...]) -> Stage:
    """A row of what one job trains on the windows of all experts together."""
    sections, module = ("experts", name, "training"), f"{MAKERS}.baselines"
    return Stage(
        name,
        f"baselines/{name}",
        sections,
        SHARED_BY_ALL,
        f"{module}:{name}",
        ("seed", *also),
        phase=lambda config: config.baseline_phase(name),
        nodes="backbone",
        baseline=name,
        schedule="experts",
        panel="baselines",
        colour=BASELINE_COLOURS[name],
    )


def _rounds() -> Iterator[Stage]:
    """A row for the experts of each round but the last, and one for the merge of what they share."""
    for number in range(1, MOST_ROUNDS):
        before, made = made_in_round(number - 1) if number > 1 else (), made_in_round(number)
        yield Stage(
            made[0],
            f"rounds/{made[0]}-{{index}}",
            ("experts", "training"),
            ("backbone", "partition", *before),
            f"{MAKERS}.expert:train_round",
            phase=lambda config: config.experts,
            nodes="expert",
            is_measured=False,
            schedule="experts",
            panel="rounds",
            round=number,
        )
        yield Stage(
            made[1],
            f"rounds/{made[1]}",
            (),
            ("backbone", made[0], *before[1:]),
            f"{MAKERS}.merge:run",
            ("seed", *OUTER, "assembly.shared"),
            is_measured=False,
            round=number,
        )


def _passes() -> Iterator[Stage]:
    """A row for each pass of cleaning by tasks, and before each but the first one that finds copies."""
    for number in range(MOST_WHOLE_CORPUS + 1):
        if number:
            yield _cleaning(f"copies_{number}", f"filter_{number - 1}", copies=number)
        before = (f"filter_{number - 1}", f"copies_{number}") if number else ()
        yield _cleaning(f"filter_{number}", *before, SHARE, copies=number)


def _cleaning(name: str, *inputs: str, copies: int = 0) -> Stage:
    """A row of what tasks do before the documents are clean."""
    is_indexed = SHARE in inputs
    return Stage(
        name,
        f"{{data}}-parts/{name}{'-{index}' if is_indexed else ''}",
        (),
        ("inventory", *inputs) if inputs else (),
        f"{MAKERS}.clean:{'filtered' if is_indexed else 'copies' if copies else name}",
        CLEANED_FROM,
        needs=CLEANING_TASKS,
        is_measured=False,
        count=CLEANING_TASKS,
        copies=copies,
    )


def made_in_round(number: int) -> tuple[str, str]:
    """The stages of a round: what an expert has learned by its end, and the mean of what all share."""
    return f"round_{number}", f"merge_{number}"


BASELINE_COLOURS = {
    "dense": "#6b6f76",
    "dense_wide": "#9aa0a8",
    "joint": "#6f4e37",
    "joint_evidence": "#b08968",
    "joint_lora": "#4a6670",
    "joint_lora_wide": "#7d98a1",
}


class _Rows(dict[str, Stage]):
    def __missing__(self, name: str) -> Stage:
        cure = f"write {OLD_NAMES[name]!r}" if name in OLD_NAMES else "choose one of these"
        raise ConfigError(f"a stage must be one of {', '.join(self)}, but is {name!r:.80}; {cure}")


STAGES: dict[str, Stage] = _Rows(
    (stage.name, stage)
    for stage in (
        _cleaning("inventory"),
        *_passes(),
        Stage(
            "clean",
            "{data}-cleaned",
            (),
            tuple(f"filter_{number}" for number in range(MOST_WHOLE_CORPUS + 1)),
            f"{MAKERS}.clean:cleaned",
            CLEANED_FROM,
            artifact="cleaned",
            within="prepare-data",
            first="vocabulary",
            needs="data.clean",
            is_measured=False,
        ),
        Stage(
            "vocabulary",
            "{data}-parts/vocabulary",
            ("data",),
            ("clean", "tokenizer"),
            f"{MAKERS}.prepare:vocabulary",
            needs=PREPARE_TASKS,
            is_measured=False,
        ),
        Stage(
            "tokenise",
            "{data}-parts/tokenise-{index}",
            ("data",),
            ("clean", "vocabulary", SHARE),
            f"{MAKERS}.prepare:tokenised",
            needs=PREPARE_TASKS,
            count=PREPARE_TASKS,
            is_measured=False,
        ),
        Stage(
            "prepare-data",
            "{data}",
            ("data",),
            ("clean", "tokenizer", "tokenise", "cmvn"),
            f"{MAKERS}.prepare:corpus",
            artifact="corpus",
            is_measured=False,
        ),
        Stage(
            "centres",
            "{data}-parts/centres",
            ("partition",),
            ("prepare-data",),
            f"{MAKERS}.prepare:centres",
            ("seed", "experts.count"),
            needs=CLUSTERING_TASKS,
            is_measured=False,
        ),
        Stage(
            "assign",
            "{data}-parts/assign-{index}",
            ("partition",),
            ("prepare-data", "centres", SHARE),
            f"{MAKERS}.prepare:assigned",
            ("seed", "experts.count"),
            needs=CLUSTERING_TASKS,
            count=CLUSTERING_TASKS,
            is_measured=False,
        ),
        Stage(
            "partition",
            "{data}/partitions",
            ("partition",),
            ("prepare-data", "assign"),
            f"{MAKERS}.prepare:partitions",
            ("seed", "experts.count"),
            artifact="partitions",
            within="prepare-data",
            apart=CLUSTERING_TASKS,
            is_measured=False,
        ),
        Stage(
            "backbone",
            "backbone",
            ("model", "backbone", "training"),
            ("prepare-data", "pretrained", "encoder"),
            f"{MAKERS}.backbone:run",
            ("seed", *COUNTED, *GATHERED),
            phase=lambda config: config.backbone,
            nodes="backbone",
            schedule="backbone",
            panel="backbone",
            colour="#1b1b1f",
        ),
        *_rounds(),
        Stage(
            "expert",
            "experts/expert-{index}",
            ("experts", "training"),
            ("backbone", "partition"),
            f"{MAKERS}.expert:run",
            phase=lambda config: config.experts,
            nodes="expert",
            schedule="experts",
            panel="experts",
        ),
        _baseline("dense", ("joint.batch_size",)),
        _baseline("dense_wide", ("joint.batch_size", "assembly.experts_per_token")),
        _baseline("joint", ROUTED),
        _baseline("joint_evidence", ("joint.batch_size", "joint.freeze_shared", *ROUTED, "assembly.token_pairs")),
        _baseline("joint_lora", ("joint.batch_size",)),
        _baseline("joint_lora_wide", ("joint.batch_size",)),
        Stage(
            "branch",
            "baselines/branches/branch-{index}",
            ("experts", "training"),
            ("backbone", "partition"),
            f"{MAKERS}.baselines:branch",
            phase=lambda config: config.experts,
            nodes="expert",
            baseline="btx",
            schedule="experts",
            panel="branches",
        ),
        Stage(
            "btx",
            "baselines/btx",
            ("experts", "btx", "training"),
            (*SHARED_BY_ALL, "branch"),
            f"{MAKERS}.baselines:btx",
            ("seed", "joint.batch_size", "joint.balance_loss", *SOLVED),
            phase=lambda config: config.btx_phase,
            nodes="backbone",
            baseline=NEVER,
            schedule="btx",
            panel="baselines",
            colour="#7f7f2a",
        ),
        Stage(
            "assemble",
            "assembled",
            ("assembly",),
            ("backbone", "expert"),
            f"{MAKERS}.assemble:run",
            ("seed", "experts.anchored"),
            artifact="assembled",
        ),
        Stage(
            "calibrate",
            "calibrated",
            ("calibration", "training"),
            ("prepare-data", "assemble"),
            f"{MAKERS}.calibrate:run",
            artifact="calibrated",
            within="assemble",
            phase=lambda config: config.calibration,
            schedule="calibration",
            panel="calibration",
            colour="#44475a",
        ),
        Stage(
            "evaluate",
            "evaluation",
            ("evaluation",),
            ("prepare-data", "models"),
            f"{MAKERS}.evaluate:run",
            artifact="evaluation",
            is_measured=False,
        ),
    )
)
"""The rows, each after those it reads."""

MADE_FOR: dict[str, dict[str, str]] = {
    "speech": {
        "prepare-data": f"{MAKERS}.speech:corpus",
        "backbone": f"{MAKERS}.speech:projector",
        "dense": f"{MAKERS}.speech:static",
        "joint": f"{MAKERS}.speech:joint",
        "calibrate": f"{MAKERS}.speech:calibrated",
        "evaluate": f"{MAKERS}.evaluate_speech:run",
    }
}
"""By task and stage, what makes it where that is not the row's own function."""
SETTINGS_FOR: dict[str, dict[str, tuple[str, ...]]] = {
    "speech": {
        "prepare-data": ("speech.data", "speech.model.prompt"),
        "backbone": ("speech.model",),
        "calibrate": ("steering.calibrates",),
        "evaluate": ("speech.decoding",),
    }
}
"""By task and stage, settings that count there beside the row's own."""
STACKED = ("joint", "assemble")
"""Stages on which the settings of a kind count too that are a section of their own."""
JOINT_LORA = ("joint_lora", "joint_lora_wide")
ALL_BASELINES = (*TRAINED_ON_ALL, "branch", "btx")
ROUNDS = tuple(name for name, stage in STAGES.items() if stage.round and stage.is_indexed)
"""The rows of experts between their rounds."""
CLEANING = tuple(name for name, stage in STAGES.items() if stage.needs == CLEANING_TASKS)
"""The rows of cleaning by tasks."""
SHARED_WORK = {
    **dict.fromkeys(CLEANING, "clean"),
    **{"vocabulary": "prepare-data", "tokenise": "prepare-data", "centres": "partition", "assign": "partition"},
}
"""By row that shares the work of another: that other, which is made without it where it is not there, and when it is
made, needs it no more."""
HOW_READ, HOW_DRAWN = "data.packing", ("data.mix", "data.temperature")
"""Settings of prepared text that count where it is read: by what trains and measures, and by what trains."""
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    # How often something is said, measured or saved, and how: the weights are the same.
    "training.compile": (EVERY,),
    "training.recompute": (EVERY,),
    "training.parallel": (EVERY,),
    "training.shard_ranks": (EVERY,),
    "training.log_every": (EVERY,),
    "training.gradient_norms": (EVERY,),
    "training.validate_every": (EVERY,),
    "training.validation_tokens": (EVERY,),
    "training.checkpoint_every": (EVERY,),
    "training.keep_checkpoints": (EVERY,),
    "training.keep_checkpoints_every": (EVERY,),
    "training.checkpoint_fallback": (EVERY,),
    **dict.fromkeys((HOW_READ, *HOW_DRAWN), ("vocabulary", "tokenise", "prepare-data")),
    # A pretrained model is an input, known by its bytes, wherever its files lie.
    "model.pretrained": (EVERY,),
    # It keeps what it ends with, or nothing.
    "training.patience": ("calibrate",),
    # One expert knows nothing of the others.
    "experts.count": ("expert", "branch", *ROUNDS),
    # What experts have and baselines have not: where an FFN starts, a public FFN beside it, a router's loss, sums.
    "experts.init": ALL_BASELINES,
    "experts.kind": ALL_BASELINES,
    "experts.anchored": ("dense", "dense_wide", *JOINT_LORA, "branch"),
    "experts.z_loss": ("dense", "dense_wide", "joint_evidence", *JOINT_LORA, "branch"),
    "experts.statistics": (*TRAINED_ON_ALL, "btx"),
    "experts.statistics_tokens": (*TRAINED_ON_ALL, "btx"),
    "experts.counted_tokens": ("dense", "dense_wide", "joint", *JOINT_LORA, "branch", "btx"),
    "experts.counted_pairs": ("dense", "dense_wide", "joint", *JOINT_LORA, "branch", "btx"),
    "experts.unfreeze": ALL_BASELINES,
    "experts.unfreeze_rate": ALL_BASELINES,
    "experts.rounds": ALL_BASELINES,
    "experts.settle": (*ALL_BASELINES, *ROUNDS),  # of the last round
    **dict.fromkeys(OUTER, (*ALL_BASELINES, "expert", *ROUNDS)),  # what counts for merges, and by them for experts
    # How experts weigh beside each other, which one alone does not know.
    "steering.routing": ("expert", "joint"),
    # What is done of the joint model, or with the assembled one.
    "steering.joint_projector": ("expert", "assemble"),
    "steering.projector_rate": ("expert", "assemble"),
    "steering.calibrates": ("expert", *STACKED),
}
"""By setting, the stages in whose sections it is and whose output it does not change. What is not here counts: a new
setting changes the identity of what reads its section, unless it is written here or in `CAME_LATER`."""
OF_ONE_KIND = {"experts.lora": ("expert", *JOINT_LORA)}
"""Sections of one kind of expert, each with the stages that it counts for where experts are of that kind."""

STANDS_FOR = {
    name: {f"{name}.peak_learning_rate": "experts.peak_learning_rate", f"{name}.batch_size": "joint.batch_size"}
    for name in (*TRAINED_ON_ALL, "btx")
}
"""By stage, its settings that outrank general ones. A stage's settings have the value that counts, under the general
name: whoever says it, the artifact is the same."""
EVERYWHERE = ("task",)
"""Settings that every stage depends on."""
CAME_LATER: dict[str, Any] = {
    "experts.kind": "ffn",
    "task": "text",
    "data.clean": [],
    "data.packing": "stream",
    "data.mix": [],
    "data.temperature": 1.0,
    "partition.everywhere": [],
    "assembly.lora": "adapters",
    "assembly.lora_choice": "token",
    "training.packing": True,
    "training.patience": None,
    "training.gradient_exchange": "fp32",
    "steering.rank": 8,
    "steering.joint_projector": False,
    "steering.projector_rate": 0.1,
    "steering.balance_loss": 0.0,
    "steering.orthogonality_loss": 0.0,
    "steering.calibrates": False,
    "experts.counted_tokens": 20_000_000,
    "experts.counted_pairs": 1_000_000,
    "experts.statistics": "moments",
    "experts.unfreeze": [],
    "experts.unfreeze_rate": 0.1,
    "experts.rounds": 1,
    "experts.settle": False,
    "experts.outer.rate": 1.0,
    "experts.outer.momentum": 0.0,
    "assembly.shared": "equal",
    "calibration.shared": False,
    "calibration.adapters": False,
    "calibration.text": "validation",
    "evaluation.general": None,
    "evaluation.chat": None,
    "evaluation.tasks": None,
    "evaluation.harness": None,
    "evaluation.harness_documents": None,
    "speech.data.keeps": "features",
    "speech.decoding.tests": None,
}
"""Settings that stages learned after artifacts had been made without them, by dotted name, each with the value under
which a stage does what it did before. With that value they are no part of a stage's settings, so that the artifact that
was made without them keeps its fingerprint. Their default may be another value."""

GONE = tuple(f"model.rope_scaling.{name}" for name in GONE_FROM_ROPE)
"""Settings that are no more. Where rotary positions are stretched they count as null, as ever: a backbone that was made
with them keeps its fingerprint."""
OF_EVIDENCE = ("assembly.token_pairs", "assembly.width_multiple", "assembly.head_multiple")
"""Settings that came with the evidence router's second form. A model of its first form was another model, so for that
router they count with any value; for the other routers nothing has changed."""
OF_PATIENCE = ("training.validate_every", "training.validation_tokens")
"""Settings without effect but where a job keeps its best weights: they say when, and by what, weights are judged."""
CHOSEN_FACT = "chosen_by_hand"  # in the manifest of an assembled model whose experts somebody chose


@dataclass(frozen=True)
class JobName:
    """A job of a run, as logs, metrics, checkpoints and Slurm call it: `backbone`, `expert-3`."""

    stage: str
    index: int | None = None

    def __str__(self) -> str:
        return self.stage if self.index is None else f"{self.stage}-{self.index}"

    @staticmethod
    def parse(text: str) -> JobName:
        """The job of that name (`expert-3` or `expert/3`); whether there is such a stage is not checked."""
        if (found := _INDEXED.fullmatch(text)) and getattr(STAGES.get(found[1]), "is_indexed", True):
            return JobName(found[1], int(found[2]))
        return JobName(text)


OLD_NAMES = {"calibration": "calibrate"} | {row.artifact: row.name for row in STAGES.values() if row.artifact}
"""Stages by what reports, metrics and records of earlier versions call them, the oldest name first."""
_INDEXED = re.compile(r"(.+?)[-/](\d{1,9})", re.ASCII)


def job_named(text: str) -> JobName:
    """The job that somebody means: by its own name, or by that of what it makes, as reports have it."""
    name = JobName.parse(text)
    stage = STAGES.get(OLD_NAMES.get(name.stage, name.stage))
    return name if stage is None else JobName(stage.job, name.index)


def wanted_stages(config: Config) -> Iterator[Stage]:
    """The rows that a run with these settings makes, each after those it reads."""
    return (stage for stage in STAGES.values() if stage.is_wanted(config))


def baseline_names() -> tuple[str, ...]:
    """What `evaluation.baselines` may name: the rows that say so, and what is made of the experts without training."""
    found = {stage.baseline: None for stage in STAGES.values() if stage.baseline and stage.baseline != NEVER}
    return (*found, *UNTRAINED_BASELINES)


def stage_url(config: Config, name: str, index: int | None = None) -> str:
    """URL of a stage's artifact."""
    folder = STAGES[name].folder
    root = "" if "{data}" in folder else f"{config.output_dir.rstrip('/')}/"
    return root + folder.format(data=config.data_url, index=index)


def metrics_url(config: Config, job: JobName | str) -> str:
    """Where a training job writes its metrics."""
    return paths.join(config.output_dir, "metrics", f"{job}.jsonl")


def checkpoint_url(config: Config, job: JobName | str) -> str:
    """Where a training job keeps its resumable state."""
    return paths.join(config.output_dir, "checkpoints", str(job))


def stage_settings(config: Config, name: str) -> dict[str, Any]:
    """The settings that a stage's output depends on, by dotted name; see `CAME_LATER` for what is left out."""
    stage, values = STAGES[name], config.model_dump(mode="json")
    if "{data}" in stage.folder:
        values["seed"] = config.preparation_seed
    values["assembly"]["router"] = config.assembly.recorded_router
    values["experts"]["statistics"] = "moments" if config.gathers_moments else "norms"
    found: dict[str, Any] = {}
    reads = (HOW_READ, *HOW_DRAWN) if stage.phase else (HOW_READ,) if name == "evaluate" else ()
    own, also = kind_of(config).settings, SETTINGS_FOR.get(config.task, {}).get(name, ())
    counts = name == "expert" or (name in STACKED and own != "experts")
    sections = {*stage.sections, own} if counts else stage.sections
    for setting in (*sections, *stage.also, *also, *reads, *EVERYWHERE):
        found.update(_flatten(setting, value_of(values, setting)))
    if "model" in stage.sections and config.model.rope_scaling:
        found |= dict.fromkeys(GONE)
    decides = OF_PATIENCE if config.training.patience and has_effect("training.patience", name) else ()
    found = {setting: value for setting, value in found.items() if setting in decides or has_effect(setting, name)}
    for section, stages in OF_ONE_KIND.items():
        if name not in stages or kind_of(config).settings != section:
            found = {setting: value for setting, value in found.items() if not setting.startswith(f"{section}.")}
    for own, general in STANDS_FOR.get(name, {}).items():
        value = value_of(values, own)
        found.pop(own, None)
        found[general] = value_of(values, general) if value is None else value
    if name == "backbone" and config.gathers_moments:  # missing as ever, so that old runs go on
        del found["experts.statistics_tokens"]
    # It has the rows that the assembled model's experts have, and none, whatever is said, where those have none.
    if name == "joint_evidence" and config.own_row_parts:
        found |= {"assembly.shared": "own", "experts.unfreeze": config.own_row_parts}
    if name == "assemble" and config.assembly.router != "evidence":
        found = {setting: value for setting, value in found.items() if setting not in OF_EVIDENCE}
    if "speech.data.normalise" in found and config.speech.data.statistics_file:  # an input, known by what it says
        found["speech.data.normalise"] = "file"
    return {name: value for name, value in found.items() if name not in CAME_LATER or CAME_LATER[name] != value}


def has_effect(setting: str, stage: str) -> bool:
    """Whether a setting of a stage's sections changes what the stage makes."""
    return not {stage, EVERY} & set(WITHOUT_EFFECT.get(setting, ()))


def fingerprint(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Identity of an artifact, 32 hexadecimal digits."""
    content = json.dumps([kind, settings, inputs], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def contents(artifact: Artifact) -> str:
    """Identity of the very bytes of an artifact, 32 hexadecimal digits: the same settings may have read other files."""
    hashes = {name: entry.digest for name, entry in artifact.manifest.files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Plan:
    """One artifact to be made: where, from which settings and inputs, and therefore its fingerprint."""

    stage: str
    url: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def kind(self) -> str:
        """What the artifact's manifest says that it is; results of a study are of no stage."""
        return STAGES[self.stage].kind if self.stage in STAGES else self.stage

    @property
    def fingerprint(self) -> str:
        """Identity of the artifact that this plan makes."""
        return fingerprint(self.kind, self.settings, self.inputs)

    def is_outgrown(self, artifact: Artifact) -> bool:
        """Whether an assembled model has the settings and the parts of this plan, but fewer experts."""
        old = artifact.manifest
        return self.stage == "assemble" and old.settings == self.settings and old.inputs.items() < self.inputs.items()

    def difference(self, artifact: Artifact) -> str:
        """Say which settings or inputs differ, the old value after the new one."""
        old, new = artifact.manifest.settings, self.settings
        changed = [
            f"{key} is {new.get(key)!r:.60} here and {old.get(key)!r:.60} there"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        inputs = artifact.manifest.inputs
        changed += [
            f"it was made from another {key}"
            for key in sorted({*self.inputs, *inputs})
            if self.inputs.get(key) != inputs.get(key)
        ]
        more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
        return "; ".join(changed[:4]) + more


def value_of(values: Any, setting: str) -> Any:
    """The value of a setting by its dotted name."""
    for part in setting.split("."):
        values = values[part]
    return values


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in _flatten(f"{prefix}.{key}", item).items()}
    return {prefix: value}
