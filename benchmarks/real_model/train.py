"""Choose rates on validation text with short trainings, then train experts and baselines.

Experts are the run's own stage. The baselines, whose rates and batches are their own, are plain model folders beside
the run: dense (all weights) and LoRA (one adapter of `peft` in all projections, merged into the weights at the end),
of an expert's rank and of all experts' together, on the very windows that the experts take.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.real_model.settings import ADAPTER_EXPERTS, CONTEXT, DOMAINS, RANKS, TUNED_ON, Scale, Trial
from modularforge.config import Config, PhaseConfig
from modularforge.experts.job import train_expert
from modularforge.experts.kind import ExpertJob
from modularforge.experts.trainable import trainable
from modularforge.model.backbone import Decoder
from modularforge.run import Run
from modularforge.stage_outputs import derived_seed, even_streams
from modularforge.stored_tokens import partition_tokens
from modularforge.tasks.text import TEXT, MixedText, TextValidation
from modularforge.training.backbone_job import save_trained_on
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORLD = World()
Prepare = Callable[[Decoder], Decoder]


class Trainings:
    """The trainings of one run; `notes` (a JSON file) remembers each trial, so that none is done twice."""

    def __init__(self, config_at: Callable[..., Config], scale: Scale, output: Path) -> None:
        self.config_at, self.scale, self.output = config_at, scale, output
        self.config = config_at()
        run = Run(self.config)
        self.backbone, self.corpus, self.partitions = run.backbone, run.corpus, run.require("partition")

    @property
    def _notes(self) -> Path:
        return self.output / "tuning.json"

    def notes(self) -> dict[str, Any]:
        """All trials so far: validation loss and CPU seconds by kind, rate, batch and steps."""
        return json.loads(self._notes.read_text()) if self._notes.is_file() else {}

    def best(self, kind: str) -> Trial:
        """The trial of the lowest validation loss, each tried where it has not been; a lone one is not tried."""
        trials = self.scale.trials[kind]
        if len(trials) == 1:
            return trials[0]
        found = {trial: self._tried(kind, trial)["loss"] for trial in trials}
        return min(found, key=lambda trial: float(found[trial]))

    def _tried(self, kind: str, trial: Trial) -> dict[str, float]:
        key = f"{kind} rate {trial.rate:g} batch {trial.batch} steps {self.scale.tuning_steps}"
        notes = self.notes()
        if key not in notes:
            start = time.process_time()
            is_expert = kind in ("experts", "lora_experts")
            loss = self._expert_loss(kind, trial) if is_expert else self._baseline(kind, trial, short=True)[1]
            notes = {**self.notes(), key: {"loss": loss, "cpu_seconds": round(time.process_time() - start, 1)}}
            self._notes.write_text(json.dumps(notes, indent=1) + "\n")
            print(key, notes[key], flush=True)
        found: dict[str, float] = notes[key]
        return found

    def _expert_loss(self, kind: str, trial: Trial) -> float:
        """Mean validation loss of short trainings of some experts, each on its own domain."""
        losses = []
        for index in TUNED_ON:
            config = self._at(trial, short=True, changes=ADAPTER_EXPERTS if kind == "lora_experts" else {})
            tokens = partition_tokens(self.partitions, index).tokens
            held_out = self._validation(index)
            job = Job(f"expert-{index} at {trial.rate:g}", config.experts, config.training)
            expert = ExpertJob(config, index, self.backbone, TEXT, TEXT.part_of(config, tokens, index), WORLD.device)
            validation = TextValidation(held_out, CONTEXT, config.evaluation.batch_size)
            _, found = train_expert(expert, validation, job, WORLD)
            losses.append(float(found["validation_loss"] or 0.0))
        return sum(losses) / len(losses)

    def _validation(self, index: int) -> Any:
        return self.corpus.domains("validation", self.scale.validation_tokens)[DOMAINS[index]]

    def _at(self, trial: Trial, short: bool, share: float = 1.0, changes: Mapping[str, Any] = {}) -> Config:
        """Settings at a trial's rate; steps are an expert's, of a short training that share of them."""
        steps = max(1, int(self.scale.tuning_steps * share)) if short else self.scale.steps
        phase = {"steps": steps, "warmup_steps": min(4, steps), "peak_learning_rate": trial.rate}
        return self.config_at(rate=trial.rate, experts={**phase, **changes})

    def baseline(self, kind: str) -> Path:
        """Train `dense`, `lora` or `lora_wide` at its best rate and batch, unless its folder is there."""
        folder = self.output / kind
        if not (folder / "config.json").is_file():
            trial = self.best(kind)
            start = time.process_time()
            model, loss = self._baseline(kind, trial, short=False)
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"rate": trial.rate, "batch": trial.batch, "validation_loss": loss}
            facts["cpu_seconds"] = round(time.process_time() - start, 1)
            (folder / "training.json").write_text(json.dumps(facts) + "\n")
            save_trained_on(model, self.backbone, folder)
            print(kind, facts, flush=True)
        return folder

    def _baseline(self, kind: str, trial: Trial, short: bool) -> tuple[Decoder, float]:
        """A baseline trained on all windows of (short) experts, and its validation loss over all domains."""
        config = self._at(trial, short, len(TUNED_ON) / len(DOMAINS))  # as many windows as a trial of experts
        steps = config.experts.steps * len(DOMAINS) // trial.batch
        phase = config.experts.model_copy(update={"steps": steps, "batch_size": trial.batch})
        torch.manual_seed(derived_seed(config.seed, kind, "weights"))
        model = self.backbone.model().float()
        trained = with_adapters(model, RANKS[kind]) if kind in RANKS else model
        held_out = even_streams(self.corpus.domains("validation"), len(DOMAINS) * self.scale.validation_tokens)
        job = Job(f"{kind} at {trial.rate:g}, batch {trial.batch}", phase, config.training)
        validation = TextValidation(held_out, CONTEXT, config.evaluation.batch_size)
        validate = partial(mean_loss, trained, validation, WORLD)
        losses = fit(trainable(trained, TEXT.loss), self._windows(config, phase), job, validate, WORLD)
        return (merged(trained) if kind in RANKS else model), float(losses["validation_loss"] or 0.0)

    def _windows(self, config: Config, phase: PhaseConfig) -> MixedText:
        streams = [partition_tokens(self.partitions, k).tokens for k in range(len(DOMAINS))]
        seeds = [derived_seed(config.seed, "expert order", k) for k in range(len(DOMAINS))]
        order, each = derived_seed(config.seed, "dense order"), config.experts.steps
        return MixedText(streams, seeds, each, CONTEXT, phase.batch_size, order)


def with_adapters(model: Decoder, rank: int) -> Decoder:
    """The model with a trainable adapter of `peft` in every projection and all else frozen, in place."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SystemExit(
            "the LoRA baseline needs peft; `pip install peft`, or leave it out (--only experts dense measure)"
        ) from error
    model.requires_grad_(False)
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=PROJECTIONS)
    changed = inject_adapter_in_model(adapters, model)
    assert isinstance(changed, Decoder)
    return changed


def merged(model: Decoder) -> Decoder:
    """The model with its adapters added to the weights, and plain layers again."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, child = name.rpartition(".")
            base: nn.Module = module.get_base_layer()
            setattr(model.get_submodule(parent), child, base)
    return model
