"""Measure one variant of one run on one split: loss per domain, sizes, tokens, and what removing an expert changes.

On validation everything is measured on the deciding half of the documents alone, because the other half is what
calibration fits: no variant is judged by text that any other learned from.
"""

# K experts  R rows  T tokens

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints import Artifact
from modularforge.calibration.calibrator import split_documents
from modularforge.config import Config
from modularforge.data.loader import IGNORED_TARGET, evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.evaluation.ensemble import posterior_ensemble, target_log_probabilities, uniform_ensemble
from modularforge.evaluation.losses import DomainLoss, measure, routing_summary
from modularforge.evaluation.suite import sizes_of
from modularforge.model.backbone import Decoder
from modularforge.model.moe import moe_layers, restrict_routing
from modularforge.study.models import build_model, calibrate_model
from modularforge.study.runs import Run
from modularforge.study.study_file import Variant
from modularforge.training.distributed import default_device

Split = Literal["validation", "test"]
Row = dict[str, Any]
ENSEMBLES = {"ensemble_uniform": uniform_ensemble, "ensemble_posterior": posterior_ensemble}
# Domains that are no more than a trace of a partition are not its expert's own.
OWN_SHARE = 0.05


@dataclass
class Bench:
    """One run and one split; scores of the experts are kept, because oracle and ensembles follow from them."""

    run: Run
    split: Split
    limit: int
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _domains: dict[str, Tokens] = field(default_factory=dict)

    @property
    def domains(self) -> dict[str, Tokens]:
        """The token stream of each domain that is measured on."""
        if not self._domains:
            corpus = self.run.corpus
            if self.split == "test":
                self._domains = corpus.domains("test", self.limit)
            else:
                _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
                self._domains = {label: tokens for label, tokens in decide.items() if len(tokens) > 1}
        return self._domains

    def measure(self, variant: Variant, config: Config, parts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Rows by name (the empty name where there is but one), and what else is known of the variant.

        `config` holds the variant's settings, with the validation limit as `evaluation.tokens_per_domain`.
        """
        experts = {name: artifact for name, artifact in parts.items() if name.startswith("expert-")}
        if variant.kind == "experts":
            return self._measure_experts(config, experts)
        if variant.kind in ENSEMBLES:
            return self._measure_ensemble(variant, config, experts)
        model = build_model(self.run, config, variant, dict(parts))
        calibration = None
        if variant.calibrate:
            fresh = build_model(self.run, config, variant, dict(parts))
            model, calibration = calibrate_model(self.run, config, model, fresh)
        found = measure(
            model,
            self.domains,
            self.run.corpus.byte_lengths,
            config.evaluation.batch_size,
            self.limit,
            default_device(),
        )
        tokens = training_tokens(config, variant.kind) + _calibration_tokens(config, variant)
        row = _row(found.domains) | sizes_of(model) | {"training_tokens": tokens}
        result: dict[str, Any] = {"rows": {"": row}, "calibration": calibration}
        if found.routing:
            result["routing"] = routing_summary(found.routing)
        if variant.removal:
            result["removal"] = self._removal(config, model, row)
        return result

    def _measure_experts(self, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Each expert alone, the best of them on the whole, and the oracle, which takes the best for each domain."""
        scores = self._scores(config, experts)
        sizes = self._expert_sizes(experts)
        tokens = training_tokens(config, "expert")
        rows = {}
        for index, name in enumerate(experts):
            losses = {label: self._loss(label, scores_KRT[index], config) for label, scores_KRT in scores.items()}
            rows[name] = _row(losses) | sizes | {"training_tokens": tokens}
        best = min(rows.values(), key=lambda row: float(row["mean_loss"]))
        chosen = {
            label: min((row["domains"][label] for row in rows.values()), key=lambda item: float(item["loss"]))
            for label in scores
        }
        every = training_tokens(config, "experts")
        oracle = _means(chosen) | sizes | {"parameters": None, "training_tokens": every}
        return {"rows": {"best expert": best, "oracle": oracle}, "experts": rows}

    def _measure_ensemble(self, variant: Variant, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        scores, mixed = self._scores(config, experts), ENSEMBLES[variant.kind]
        losses = {label: self._loss(label, mixed(scores_KRT), config) for label, scores_KRT in scores.items()}
        sizes = {name: value * len(experts) for name, value in self._expert_sizes(experts).items()}
        row = _row(losses) | sizes | {"training_tokens": training_tokens(config, variant.kind)}
        return {"rows": {"": row}}

    def _scores(self, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Tensor]:
        """What each expert gives every target, [K, R, T] by domain."""
        key = ",".join(artifact.manifest.fingerprint for artifact in experts.values())
        if key not in self.scores:
            by_domain: dict[str, list[Tensor]] = {label: [] for label in self.domains}
            for artifact in experts.values():
                model = self.run.backbone.expert(artifact).to(default_device())
                for label, tokens in self.domains.items():
                    batch = config.evaluation.batch_size
                    by_domain[label].append(target_log_probabilities(model, tokens, batch, self.limit))
            self.scores = {key: {label: torch.stack(found) for label, found in by_domain.items()}}
        return self.scores[key]

    def _expert_sizes(self, experts: Mapping[str, Artifact]) -> dict[str, int]:
        model = self.run.backbone.expert(next(iter(experts.values())))
        return sizes_of(model)

    def _loss(self, label: str, scores_RT: Tensor, config: Config) -> DomainLoss:
        """The loss of scores, and the tokens and bytes it was taken over."""
        context, batch = config.model.context_length, config.evaluation.batch_size
        pieces = [targets for _, targets in evaluation_batches(self.domains[label], context, batch, self.limit)]
        targets_RT = torch.cat(pieces)
        kept = targets_RT != IGNORED_TARGET
        size = int(self.run.corpus.byte_lengths[targets_RT[kept]].sum())
        return DomainLoss(-float(scores_RT[kept].double().mean()), int(kept.sum()), size)

    def _removal(self, config: Config, model: Decoder, whole: Row) -> dict[str, Any]:
        """Relative change of the loss of each domain when one expert's slot is closed, by expert.

        `others` is the largest change among the domains that are not the removed expert's own.
        """
        own, slots = self._own_domains(), range(len(moe_layers(model)[0].experts))
        first = len(slots) - config.experts.count
        changes: dict[str, dict[str, float]] = {}
        for index in range(config.experts.count):
            restrict_routing(model, [slot for slot in slots if slot != first + index])
            batch, device = config.evaluation.batch_size, default_device()
            found = measure(model, self.domains, self.run.corpus.byte_lengths, batch, self.limit, device).domains
            changes[f"expert-{index}"] = {
                label: item.loss / whole["domains"][label]["loss"] - 1 for label, item in found.items()
            }
        restrict_routing(model, None)
        others = [
            change
            for index, (_, row) in enumerate(changes.items())
            for label, change in row.items()
            if label not in own[index]
        ]
        return {"changes": changes, "others": max(others, key=abs), "others_mean": sum(others) / len(others)}

    def _own_domains(self) -> list[set[str]]:
        partitions = self.run.obtain("partitions").read_json("partitions.json")["partitions"]
        return [
            {label for label, count in item["tokens_by_label"].items() if count >= OWN_SHARE * item["tokens"]}
            for item in partitions
        ]


def training_tokens(config: Config, kind: str) -> int:
    """Tokens that went into a kind of model, those of its backbone included."""
    experts = {"backbone": 0, "expert": 1}.get(kind, config.experts.count)
    windows = config.backbone.steps * config.backbone.batch_size
    windows += experts * config.experts.steps * config.experts.batch_size
    return windows * config.model.context_length


def _calibration_tokens(config: Config, variant: Variant) -> int:
    phase = config.calibration
    return phase.steps * phase.batch_size * config.model.context_length if variant.calibrate else 0


def _row(losses: Mapping[str, DomainLoss]) -> Row:
    return _means(
        {
            label: {"loss": item.loss, "bits_per_byte": item.bits_per_byte, "tokens": item.tokens}
            for label, item in losses.items()
        }
    )


def _means(domains: Mapping[str, Mapping[str, Any]]) -> Row:
    count = len(domains)
    mean = sum(item["loss"] for item in domains.values()) / count
    bits = sum(item["bits_per_byte"] for item in domains.values()) / count
    assert math.isfinite(mean)
    return {"mean_loss": mean, "bits_per_byte": bits, "domains": dict(domains)}
