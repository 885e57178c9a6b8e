"""Measure one variant of one run on one split: losses by domain, position, switch and passage, sizes, and removals.

Everything follows from one number per target, its log-probability, so that single models, oracle and ensembles are
measured alike. On validation only the selection half of the documents is used, because the other half is what
calibration fits: no variant is judged by text that any other learned from.
"""

# K experts  R rows (windows)  T tokens

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints import Artifact, plain_folder
from modularforge.assembly.assemble import assemble
from modularforge.calibration.calibrator import calibrate_as_set, split_documents
from modularforge.config import Config
from modularforge.data.token_files import Stream
from modularforge.errors import ConfigError
from modularforge.evaluation.baselines import build_btx, build_soup
from modularforge.evaluation.bench import Bench, Scores, is_expert, oracle_row, sizes_of, training_tokens
from modularforge.evaluation.extras import Extras, Texts
from modularforge.evaluation.paired import document_sums
from modularforge.evaluation.probes import SPREAD, TEXT
from modularforge.evaluation.replies import AskedTask, prepare_tasks
from modularforge.evaluation.scoring import Row, means, posterior_ensemble, score, summarise, uniform_ensemble
from modularforge.facts import fact
from modularforge.model.backbone import Decoder
from modularforge.model.folder import load_model
from modularforge.model.hub_config import end_tokens
from modularforge.model.moe import moe_layers, restrict_routing
from modularforge.observe.metrics import standing
from modularforge.pipeline import JobName
from modularforge.stage_outputs import own_domains
from modularforge.study.runs import StudyRun
from modularforge.study.study_file import NEEDS, Variant
from modularforge.training.distributed import World, default_device
from modularforge.training.job import Job
from modularforge.training.precision import measuring

Split = Literal["validation", "test"]
ENSEMBLES = {"ensemble_uniform": uniform_ensemble, "ensemble_posterior": posterior_ensemble}
# Of the tokens of a domain, as many targets behind a switch, and as many in mixed documents.
PROBE_SHARE = 4
COSTS = ("parameters", "active_parameters", "flops_per_token", "training_tokens", "trained_bytes", "processor_seconds")
WITHOUT = "without own expert"
CARRIED = "carried over windows"


def needed_artifacts(run: StudyRun, variant: Variant) -> dict[str, Artifact]:
    """What a variant is made of besides the data, by name; trains what is missing."""
    found = {"backbone": run.backbone.artifact}
    stage = NEEDS[variant.kind]
    if stage in ("expert", "branch"):
        found |= {str(JobName(stage, k)): artifact for k, artifact in enumerate(run.obtain_each(stage))}
    elif stage is not None:
        found[stage] = run.obtain(stage)
    return found


def build_model(run: StudyRun, config: Config, variant: Variant, parts: Mapping[str, Artifact]) -> Decoder:
    """The model of a variant that is one model, in memory: what the stages trained, put together as `config` says.

    `config` holds the variant's settings, `parts` its artifacts.
    """
    members = [artifact for name, artifact in parts.items() if JobName.parse(name).index is not None]
    if variant.kind == "assembled":
        return _assembled(config, parts["backbone"], members)
    if variant.kind == "btx":
        return build_btx(config, run.backbone, members)
    if variant.kind == "soup":
        return build_soup(config, run.backbone, members)
    return load_model(parts[NEEDS[variant.kind] or "backbone"].local_folder())


def _assembled(config: Config, backbone: Artifact, experts: list[Artifact]) -> Decoder:
    """The assembler's own output, through a scratch folder that is gone afterwards: nothing can differ from it."""
    with tempfile.TemporaryDirectory() as scratch:
        assemble(config, backbone, experts, plain_folder(Path(scratch)))
        return load_model(Path(scratch))


def calibrate_model(run: StudyRun, config: Config, model: Decoder, fresh: Decoder) -> tuple[Decoder, dict[str, float]]:
    """Calibrate `model` and return it, or `fresh`, which is the same untouched, when it did not get better."""
    job = Job("calibrate", config.calibration, config.training)
    world = World(device=default_device())
    result = calibrate_as_set(model, config, run.corpus, run.obtain("partition"), job, world)
    return (model if result.kept else fresh), result.facts


@dataclass
class RunBench:
    """One run and one split; scores of the experts are kept, because oracle and ensembles follow from them.

    `texts` are of no domain, and measured besides.
    """

    run: StudyRun
    split: Split
    limit: int
    texts: Texts = field(default_factory=dict)
    _expert_scores: dict[str, Scores] = field(default_factory=dict)

    @cached_property
    def bench(self) -> Bench:
        """The text of the split in windows, the same for every variant."""
        share = self.limit // PROBE_SHARE
        return Bench(self.run.config, self.run.corpus, self._domains, self.limit, share, Extras(self.texts))

    @property
    def _domains(self) -> dict[str, Stream]:
        """The token stream of each domain that is measured on."""
        corpus = self.run.corpus
        if self.split == "test":
            return corpus.domains("test", self.limit * SPREAD)
        _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
        return {label: tokens for label, tokens in decide.items() if len(tokens) > 1}

    def measure(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Rows by name (the empty name where there is but one), and what else is known of the variant.

        `config` holds the variant's settings, with the validation limit as `evaluation.tokens_per_domain`.
        """
        experts = {name: artifact for name, artifact in parts.items() if is_expert(name)}
        if variant.kind == "experts":
            return self.measure_experts(config, experts)
        if variant.kind in ENSEMBLES:
            return self._measure_ensemble(variant, config, experts)
        return self._measure_model(variant, config, parts)

    def _measure_model(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        model, calibration = build_model(self.run, config, variant, parts), None
        if variant.options.calibrate:
            fresh = build_model(self.run, config, variant, parts)
            model, calibration = calibrate_model(self.run, config, model, fresh)
        scores = self.bench.score(model)
        row = self.bench.summarise(scores) | self._sizes(model) | self._replies(variant.name, model)
        row["training_tokens"] = training_tokens(config, variant.kind, variant.options.calibrate)
        row |= self._trained(artifact for name, artifact in parts.items() if name != "backbone")
        about = {name: row[name] for name in COSTS}
        result: dict[str, Any] = {"rows": {"": row}, "calibration": calibration}
        if variant.options.carry:
            result["rows"][CARRIED] = self.bench.summarise({**scores, TEXT: self.bench.carried(model)}) | about
        if variant.options.without:
            result["rows"][WITHOUT] = self._without(variant, config, parts) | about
        if variant.options.removal:
            result["removal"] = self._removal(config, model, row)
        return result

    def measure_experts(self, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Each expert alone, the best of them on the whole, and the oracle, which takes the best for each domain."""
        scores, about = self.score_experts(experts), self._expert_sizes(experts)
        about["training_tokens"] = training_tokens(config, "expert")
        rows = {
            name: self.bench.summarise({probe: scores_KRT[index] for probe, scores_KRT in scores.items()})
            | about
            | self._trained([experts[name]])
            | (self._replies(name, self.run.backbone.expert(experts[name])) if self._tasks else {})
            for index, name in enumerate(experts)
        }
        best = min(rows.values(), key=standing)
        alone = {name: {key: value for key, value in row.items() if key != "documents"} for name, row in rows.items()}
        bound = oracle_row(config, rows) | self._trained(experts.values()) | self._best_replies(rows)
        return {"rows": {"best expert": best, "oracle": bound}, "experts": alone}

    def _trained(self, artifacts: Iterable[Artifact]) -> dict[str, Any]:
        """Bytes of these artifacts that are not the backbone's, and the processor seconds of their training.

        The seconds are None where one of them does not say.
        """
        made = list(artifacts)
        taken = {entry.digest for entry in self.run.backbone.artifact.manifest.files.values()}
        files = [entry for artifact in made for entry in artifact.manifest.files.values()]
        seconds = [fact(artifact, "processor_seconds", None) for artifact in made]
        return {
            "trained_bytes": sum(entry.size for entry in files if entry.digest not in taken),
            "processor_seconds": None if None in seconds else sum(seconds),
        }

    @cached_property
    def _tasks(self) -> list[AskedTask]:
        """What models are asked: on the test split alone, where it is said how good they are."""
        return prepare_tasks(self.run.config, self.run.corpus) if self.split == "test" else []

    def _replies(self, name: str, model: Decoder) -> dict[str, Any]:
        """How well a model replies, by task and metric; nothing where nothing is asked."""
        ends = {self.run.corpus.end_token, *end_tokens(self.run.backbone.values)}
        for task in self._tasks:
            task.ask(name, model.to(default_device()), ends)
        found = {task.settings.source: task.measured(name)[0] for task in self._tasks}
        return {"tasks": found} if found else {}

    def _best_replies(self, rows: Mapping[str, Row]) -> dict[str, Any]:
        """What the oracle's experts reply: of each task the one that is best by its loss there."""
        names = [task.settings.source for task in self._tasks]
        best = {name: min(rows.values(), key=lambda row: float(row["domains"][name]["loss"])) for name in names}
        return {"tasks": {name: row["tasks"][name] for name, row in best.items()}} if best else {}

    def _measure_ensemble(self, variant: Variant, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        mix, scores = ENSEMBLES[variant.kind], self.score_experts(experts)
        row = self.bench.summarise({name: mix(scores_KRT) for name, scores_KRT in scores.items()})
        sizes = {name: value * len(experts) for name, value in self._expert_sizes(experts).items()}
        sizes |= self._trained(experts.values())
        return {"rows": {"": row | sizes | {"training_tokens": training_tokens(config, variant.kind)}}}

    def score_experts(self, experts: Mapping[str, Artifact]) -> Scores:
        """What each expert gives every target of the probes, [K, R, T] by name."""
        key = ",".join(artifact.manifest.fingerprint for artifact in experts.values())
        if key not in self._expert_scores:
            each = [self.bench.score(self.run.backbone.expert(artifact)) for artifact in experts.values()]
            stacked: dict[str, Tensor] = {name: torch.stack([item[name] for item in each]) for name in each[0]}
            self._expert_scores = {key: stacked}
        return self._expert_scores[key]

    def _sizes(self, model: Decoder) -> dict[str, int]:
        return sizes_of(model, self.run.config.model.context_length)

    def _expert_sizes(self, experts: Mapping[str, Artifact]) -> dict[str, int]:
        return self._sizes(self.run.backbone.expert(next(iter(experts.values()))))

    def _without(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> Row:
        """Each domain by a model that was assembled from the other experts, so that its router knows nothing of it."""
        probe, lengths = self.bench.probes()[TEXT], self.run.corpus.byte_lengths
        own, batch_size = own_domains(self.run.obtain("partition")), self.run.config.evaluation.batch_size
        domains: dict[str, Row] = {}
        documents: Row = {"shares_documents": False, "tokens": {}, "losses": {}}
        for label in probe.labels:
            foreign = [str(JobName("expert", index)) for index, mine in enumerate(own) if label not in mine]
            kept = {name: part for name, part in parts.items() if not is_expert(name) or name in foreign}
            model = build_model(self.run, _with_experts(config, len(foreign)), variant, kept)
            alone = probe.only(label)
            with measuring(config.training, default_device()):
                scores_RT = score(model.to(default_device()), alone, batch_size)
            domains |= summarise(alone, scores_RT, lengths)["domains"]
            for name, sums in document_sums(alone, scores_RT).items():
                documents[name] = documents[name] | sums if isinstance(sums, dict) else sums
        return means(domains) | {"probes": {}, "documents": {TEXT: documents}}

    def _removal(self, config: Config, model: Decoder, whole: Row) -> dict[str, Any]:
        """Relative change of the loss of each domain when one expert's slot is closed, by expert.

        `others` is the largest change among the domains that are not the removed expert's own.
        """
        if not moe_layers(model):
            raise ConfigError(
                "removal needs a model that chooses among experts, but assembly.lora average has one adapter; leave it"
            )
        own, slots = own_domains(self.run.obtain("partition")), range(len(moe_layers(model)[0].experts))
        first = len(slots) - config.experts.count  # behind the public expert, which stays
        changes: dict[str, dict[str, float]] = {}
        for index in range(config.experts.count):
            restrict_routing(model, [slot for slot in slots if slot != first + index])
            found = self.bench.summarise(self.bench.score(model, [TEXT]))["domains"]
            changes[str(JobName("expert", index))] = {
                label: item["loss"] / whole["domains"][label]["loss"] - 1 for label, item in found.items()
            }
        restrict_routing(model, None)
        pairs = zip(changes.values(), own, strict=True)
        others = [change for row, mine in pairs for label, change in row.items() if label not in mine]
        if not others:
            return {"changes": changes, "others": None, "others_mean": None}
        return {"changes": changes, "others": max(others, key=abs), "others_mean": sum(others) / len(others)}


def _with_experts(config: Config, count: int) -> Config:
    """The settings of a model of fewer experts."""
    if not count:
        raise ConfigError(
            "without needs experts that know nothing of a domain, but all do; use partition.method: domain"
        )
    active = min(config.assembly.experts_per_token, count + int(config.has_public_expert))
    experts = config.experts.model_copy(update={"count": count})
    assembly = config.assembly.model_copy(update={"experts_per_token": active})
    return config.model_copy(update={"experts": experts, "assembly": assembly})
