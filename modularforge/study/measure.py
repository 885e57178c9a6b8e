"""Measure one variant of one run on one split: losses by domain, position, switch and passage, sizes, and removals.

Everything follows from one number per target, its log-probability, so that single models, oracle and ensembles are
measured alike. On validation only the deciding half of the documents is used, because the other half is what
calibration fits: no variant is judged by text that any other learned from.
"""

# K experts  R rows (windows)  T tokens

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints import Artifact
from modularforge.artifacts import partition_rows
from modularforge.calibration.calibrator import split_documents
from modularforge.config import Config
from modularforge.data.token_files import Tokens
from modularforge.errors import ConfigError
from modularforge.evaluation.ensemble import posterior_ensemble, uniform_ensemble
from modularforge.evaluation.general import Texts, token_streams
from modularforge.evaluation.paired import document_sums
from modularforge.evaluation.probes import GENERAL, SPREAD, TEXT, Probe, domain_probes, text_probe
from modularforge.evaluation.scoring import Row, full_row, means, oracle, score, summarise
from modularforge.evaluation.suite import sizes_of
from modularforge.model.backbone import Decoder
from modularforge.model.moe import moe_layers, restrict_routing
from modularforge.study.models import build_model, calibrate_model
from modularforge.study.runs import StudyRun
from modularforge.study.study_file import Variant
from modularforge.training.distributed import default_device

Split = Literal["validation", "test"]
Scores = dict[str, Tensor]
ENSEMBLES = {"ensemble_uniform": uniform_ensemble, "ensemble_posterior": posterior_ensemble}
# Domains that are no more than a trace of a partition are not its expert's own.
OWN_SHARE = 0.05
# Of the tokens of a domain, as many targets behind a switch, and as many in mixed documents.
PROBE_SHARE = 4
WITHOUT = "without own expert"
CARRIED = "carried over windows"


@dataclass
class Bench:
    """One run and one split; scores of the experts are kept, because oracle and ensembles follow from them.

    `texts` are of no domain, and measured besides.
    """

    run: StudyRun
    split: Split
    limit: int
    texts: Texts = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    @cached_property
    def domains(self) -> dict[str, Tokens]:
        """The token stream of each domain that is measured on."""
        corpus = self.run.corpus
        if self.split == "test":
            return corpus.domains("test", self.limit * SPREAD)
        _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
        return {label: tokens for label, tokens in decide.items() if len(tokens) > 1}

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """What is to be predicted, by name: text of the domains, behind a switch, in mixed documents, of no domain."""
        corpus, context = self.run.corpus, self.window[0]
        found = domain_probes(self.domains, context, corpus.end_token, self.limit, self.limit // PROBE_SHARE)
        if self.texts:
            general = token_streams(self.texts, corpus, self.limit)
            found[GENERAL] = text_probe(GENERAL, general, context, corpus.end_token, self.limit)
        return found

    def measure(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Rows by name (the empty name where there is but one), and what else is known of the variant.

        `config` holds the variant's settings, with the validation limit as `evaluation.tokens_per_domain`.
        """
        experts = {name: artifact for name, artifact in parts.items() if name.startswith("expert-")}
        if variant.kind == "experts":
            return self.measure_experts(config, experts)
        if variant.kind in ENSEMBLES:
            return self._measure_ensemble(variant, config, experts)
        model = build_model(self.run, config, variant, dict(parts))
        calibration = None
        if variant.calibrate:
            fresh = build_model(self.run, config, variant, dict(parts))
            model, calibration = calibrate_model(self.run, config, model, fresh)
        tokens = training_tokens(config, variant.kind) + _calibration_tokens(config, variant)
        scores = self.score(model)
        row = self.summarise(scores) | sizes_of(model) | {"training_tokens": tokens}
        result: dict[str, Any] = {"rows": {"": row}, "calibration": calibration}
        if variant.carry:
            carried = {**scores, TEXT: score(model, self.probes[TEXT], self.window[1], carries=True)}
            about = {name: row[name] for name in ("parameters", "active_parameters", "flops_per_token")}
            result["rows"][CARRIED] = self.summarise(carried) | about | {"training_tokens": tokens}
        if variant.without:
            about = {name: row[name] for name in ("parameters", "active_parameters", "flops_per_token")}
            without = self._without(variant, config, parts) | about
            result["rows"][WITHOUT] = without | {"training_tokens": tokens}
        if variant.removal:
            result["removal"] = self._removal(config, model, row)
        return result

    @property
    def window(self) -> tuple[int, int]:
        """Context length and batch size, the same for every variant."""
        config = self.run.config
        return config.model.context_length, config.evaluation.batch_size

    def score(self, model: Decoder, only: Collection[str] = ()) -> Scores:
        """What a model gives every target of the probes, [R, T] by name; of those named where some are."""
        model.to(default_device())
        wanted = {name: probe for name, probe in self.probes.items() if not only or name in only}
        return {name: score(model, probe, self.window[1]) for name, probe in wanted.items()}

    def summarise(self, scores: Mapping[str, Tensor]) -> Row:
        """Losses from the log-probabilities of the targets."""
        return full_row(self.probes, scores, self.run.corpus.byte_lengths)

    def measure_experts(self, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Each expert alone, the best of them on the whole, and the oracle, which takes the best for each domain."""
        scores, sizes = self.score_experts(experts), self._expert_sizes(experts)
        tokens = training_tokens(config, "expert")
        rows = {
            name: self.summarise({probe: scores_KRT[index] for probe, scores_KRT in scores.items()})
            | sizes
            | {"training_tokens": tokens}
            for index, name in enumerate(experts)
        }
        best = min(rows.values(), key=lambda row: float(row["mean_loss"]))
        every = training_tokens(config, "experts")
        bound = oracle(rows) | sizes | {"parameters": None, "training_tokens": every}
        alone = {name: {key: value for key, value in row.items() if key != "documents"} for name, row in rows.items()}
        return {"rows": {"best expert": best, "oracle": bound}, "experts": alone}

    def _measure_ensemble(self, variant: Variant, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        mixed = ENSEMBLES[variant.kind]
        row = self.summarise({name: mixed(scores_KRT) for name, scores_KRT in self.score_experts(experts).items()})
        sizes = {name: value * len(experts) for name, value in self._expert_sizes(experts).items()}
        return {"rows": {"": row | sizes | {"training_tokens": training_tokens(config, variant.kind)}}}

    def score_experts(self, experts: Mapping[str, Artifact]) -> Scores:
        """What each expert gives every target of the probes, [K, R, T] by name."""
        key = ",".join(artifact.manifest.fingerprint for artifact in experts.values())
        if key not in self.scores:
            each = [self.score(self.run.backbone.expert(artifact)) for artifact in experts.values()]
            self.scores = {key: {name: torch.stack([item[name] for item in each]) for name in self.probes}}
        return self.scores[key]

    def _expert_sizes(self, experts: Mapping[str, Artifact]) -> dict[str, int]:
        return sizes_of(self.run.backbone.expert(next(iter(experts.values()))))

    def _without(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> Row:
        """Each domain by a model that was assembled from the other experts, so that its router knows nothing of it."""
        probe, lengths, own = self.probes[TEXT], self.run.corpus.byte_lengths, self._own_domains()
        domains: dict[str, Row] = {}
        documents: Row = {"shares_documents": False, "tokens": {}, "losses": {}}
        for label in probe.labels:
            kept = [index for index, mine in enumerate(own) if label not in mine]
            model = build_model(self.run, _with_experts(config, len(kept)), variant, {
                name: part
                for name, part in parts.items()
                if not name.startswith("expert-") or int(name.removeprefix("expert-")) in kept
            })  # fmt: skip
            alone = probe.only(label)
            scores_RT = score(model.to(default_device()), alone, self.window[1])
            domains |= summarise(alone, scores_RT, lengths)["domains"]
            for name, sums in document_sums(alone, scores_RT).items():
                documents[name] = documents[name] | sums if isinstance(sums, dict) else sums
        return means(domains) | {"probes": {}, "documents": {TEXT: documents}}

    def _removal(self, config: Config, model: Decoder, whole: Row) -> dict[str, Any]:
        """Relative change of the loss of each domain when one expert's slot is closed, by expert.

        `others` is the largest change among the domains that are not the removed expert's own.
        """
        own, slots = self._own_domains(), range(len(moe_layers(model)[0].experts))
        first = len(slots) - config.experts.count
        changes: dict[str, dict[str, float]] = {}
        for index in range(config.experts.count):
            restrict_routing(model, [slot for slot in slots if slot != first + index])
            found = self.summarise(self.score(model, [TEXT]))["domains"]
            changes[f"expert-{index}"] = {
                label: item["loss"] / whole["domains"][label]["loss"] - 1 for label, item in found.items()
            }
        restrict_routing(model, None)
        others = [
            change
            for row, mine in zip(changes.values(), own, strict=True)
            for label, change in row.items()
            if label not in mine
        ]
        if not others:
            return {"changes": changes, "others": None, "others_mean": None}
        return {"changes": changes, "others": max(others, key=abs), "others_mean": sum(others) / len(others)}

    def _own_domains(self) -> list[set[str]]:
        return [
            {label for label, count in row.tokens_by_label.items() if count >= OWN_SHARE * row.tokens}
            for row in partition_rows(self.run.obtain("partitions"))
        ]


def training_tokens(config: Config, kind: str) -> int:
    """Tokens that went into a kind of model, those of its backbone included; `experts` stands for all of them."""
    experts = {"backbone": 0, "expert": 1}.get(kind, config.experts.count)
    windows = config.backbone.steps * config.backbone.batch_size
    windows += experts * config.experts.steps * config.experts.batch_size
    if kind == "btx_trained":
        windows += config.btx_phase.steps * config.btx_phase.batch_size
    return windows * config.model.context_length


def _calibration_tokens(config: Config, variant: Variant) -> int:
    phase = config.calibration
    return phase.steps * phase.batch_size * config.model.context_length if variant.calibrate else 0


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
