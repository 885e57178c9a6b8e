"""Measure one variant of one run on one split: loss per domain and by position, sizes, and what removals change.

Everything follows from one number per target, its log-probability, so that single models, oracle and ensembles are
measured alike. On validation only the deciding half of the documents is used, because the other half is what
calibration fits: no variant is judged by text that any other learned from.
"""

# K experts  R rows (windows)  T tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints import Artifact
from modularforge.artifacts import partition_rows
from modularforge.calibration.calibrator import split_documents
from modularforge.config import Config
from modularforge.data.loader import IGNORED_TARGET, evaluation_batches
from modularforge.data.token_files import Tokens
from modularforge.evaluation.ensemble import posterior_ensemble, target_log_probabilities, uniform_ensemble
from modularforge.evaluation.losses import DomainLoss
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
FIRST_POSITIONS = 16


@dataclass
class Bench:
    """One run and one split; scores of the experts are kept, because oracle and ensembles follow from them."""

    run: Run
    split: Split
    limit: int
    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def domains(self) -> dict[str, Tokens]:
        """The token stream of each domain that is measured on."""
        corpus = self.run.corpus
        if self.split == "test":
            return corpus.domains("test", self.limit)
        _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
        return {label: tokens for label, tokens in decide.items() if len(tokens) > 1}

    @cached_property
    def targets(self) -> dict[str, Tensor]:
        """What is to be predicted, [R, T] by domain."""
        return {
            label: torch.cat([targets for _, targets in evaluation_batches(tokens, *self.window, self.limit)])
            for label, tokens in self.domains.items()
        }

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
        row = self.summarise(self.score(model)) | sizes_of(model) | {"training_tokens": tokens}
        result: dict[str, Any] = {"rows": {"": row}, "calibration": calibration}
        if variant.removal:
            result["removal"] = self._removal(config, model, row)
        return result

    @property
    def window(self) -> tuple[int, int]:
        """Context length and batch size, the same for every variant."""
        config = self.run.config
        return config.model.context_length, config.evaluation.batch_size

    def score(self, model: Decoder) -> dict[str, Tensor]:
        """What a model gives every target, [R, T] by domain."""
        model.to(default_device())
        return {
            label: target_log_probabilities(model, tokens, *self.window, self.limit)
            for label, tokens in self.domains.items()
        }

    def summarise(self, scores: Mapping[str, Tensor]) -> Row:
        """Losses from the log-probabilities of the targets."""
        return _means({label: self._domain(label, scores_RT) for label, scores_RT in scores.items()})

    def _domain(self, label: str, scores_RT: Tensor) -> Row:
        targets_RT = self.targets[label]
        kept_RT = targets_RT != IGNORED_TARGET
        size = int(self.run.corpus.byte_lengths[targets_RT[kept_RT]].sum())
        item = DomainLoss(-float(scores_RT[kept_RT].double().mean()), int(kept_RT.sum()), size)
        positions = {
            f"{first}-{end - 1}": -float(scores_RT[:, first:end][kept_RT[:, first:end]].double().mean())
            for first, end in position_ranges(scores_RT.shape[1])
            if kept_RT[:, first:end].any()
        }
        return {
            "loss": item.loss,
            "bits_per_byte": item.bits_per_byte,
            "tokens": item.tokens,
            "positions": positions,
        }

    def measure_experts(self, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        """Each expert alone, the best of them on the whole, and the oracle, which takes the best for each domain."""
        scores, sizes = self.score_experts(experts), self._expert_sizes(experts)
        tokens = training_tokens(config, "expert")
        rows = {
            name: self.summarise({label: scores_KRT[index] for label, scores_KRT in scores.items()})
            | sizes
            | {"training_tokens": tokens}
            for index, name in enumerate(experts)
        }
        best = min(rows.values(), key=lambda row: float(row["mean_loss"]))
        chosen = {
            label: min((row["domains"][label] for row in rows.values()), key=lambda item: float(item["loss"]))
            for label in scores
        }
        every = training_tokens(config, "experts")
        oracle = _means(chosen) | sizes | {"parameters": None, "training_tokens": every}
        return {"rows": {"best expert": best, "oracle": oracle}, "experts": rows}

    def _measure_ensemble(self, variant: Variant, config: Config, experts: Mapping[str, Artifact]) -> dict[str, Any]:
        mixed = ENSEMBLES[variant.kind]
        row = self.summarise({label: mixed(scores_KRT) for label, scores_KRT in self.score_experts(experts).items()})
        sizes = {name: value * len(experts) for name, value in self._expert_sizes(experts).items()}
        return {"rows": {"": row | sizes | {"training_tokens": training_tokens(config, variant.kind)}}}

    def score_experts(self, experts: Mapping[str, Artifact]) -> dict[str, Tensor]:
        """What each expert gives every target, [K, R, T] by domain."""
        key = ",".join(artifact.manifest.fingerprint for artifact in experts.values())
        if key not in self.scores:
            each = [self.score(self.run.backbone.expert(artifact)) for artifact in experts.values()]
            self.scores = {key: {label: torch.stack([item[label] for item in each]) for label in self.domains}}
        return self.scores[key]

    def _expert_sizes(self, experts: Mapping[str, Artifact]) -> dict[str, int]:
        return sizes_of(self.run.backbone.expert(next(iter(experts.values()))))

    def _removal(self, config: Config, model: Decoder, whole: Row) -> dict[str, Any]:
        """Relative change of the loss of each domain when one expert's slot is closed, by expert.

        `others` is the largest change among the domains that are not the removed expert's own.
        """
        own, slots = self._own_domains(), range(len(moe_layers(model)[0].experts))
        first = len(slots) - config.experts.count
        changes: dict[str, dict[str, float]] = {}
        for index in range(config.experts.count):
            restrict_routing(model, [slot for slot in slots if slot != first + index])
            found = self.summarise(self.score(model))["domains"]
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


def position_ranges(context_length: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of positions in a window, each as long as all before it."""
    ends = [FIRST_POSITIONS]
    while ends[-1] < context_length:
        ends.append(ends[-1] * 2)
    return [(first, min(end, context_length)) for first, end in zip([0, *ends], ends, strict=False)]


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


def _means(domains: Mapping[str, Row]) -> Row:
    """Equal-weight means over the domains, also by position where all of them have such."""
    items = list(domains.values())
    positions = [name for name in items[0]["positions"] if all(name in item["positions"] for item in items)]
    return {
        "mean_loss": sum(item["loss"] for item in items) / len(items),
        "bits_per_byte": sum(item["bits_per_byte"] for item in items) / len(items),
        "positions": {name: sum(item["positions"][name] for item in items) / len(items) for name in positions},
        "domains": dict(domains),
    }
