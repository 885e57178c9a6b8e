"""What limits routing in a study: the assembled model with routers that Hugging Face's format cannot hold, or not yet.

    OMP_NUM_THREADS=1 python benchmarks/routing.py configs/study-domains.yaml

Each line is the mean validation loss and the share of the oracle's gain over the backbone that is kept, on the whole
and by position in the window. The references are the first lines: backbone, oracle and the evidence router as it is.
What is not trained yet (`modularforge study CONFIG --only experts`) is trained first.
"""

# N tokens  R rows (windows)  T tokens of a window  E experts (router)  K experts (their scores)  D width

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints import Artifact
from modularforge.calibration.calibrator import calibrate, even_mixture, split_documents
from modularforge.config import Config
from modularforge.evaluation.scoring import posterior_ensemble
from modularforge.model.backbone import Decoder
from modularforge.model.moe import moe_layers
from modularforge.routing.solvers import router_rows
from modularforge.stage_outputs import derived_seed
from modularforge.stored_tokens import partition_tokens
from modularforge.study.measure import RunBench, build_model
from modularforge.study.runs import Runs
from modularforge.study.study_file import load_study, variants_of
from modularforge.training.distributed import World
from modularforge.training.job import Job

Change = Callable[[Tensor, Tensor, int], Tensor]  # logits [R, T, E], router inputs [R, T, D], layer -> logits
# The rows, which alone can be changed by a hook, and a slot for each expert.
ROUTER = {"assembly.router": "evidence", "assembly.token_pairs": 0, "assembly.public_expert": False}


class Trial:
    """One run of a study, and what the trials are compared with."""

    def __init__(self, study: str, seed: int, recipe: str) -> None:
        self.runs, self.seed, self.recipe = Runs(load_study(study)), seed, recipe
        self.run = self.runs.run(seed, recipe)
        self.experts = self.run.obtain_each("expert")
        self.measured = RunBench(self.run, "validation", self.runs.study.validation_tokens_per_domain)
        self.bench = self.measured.bench
        self.scores = self.measured.score_experts(self.parts)
        self.variant = next(item for item in variants_of(self.runs.study) if item.kind == "assembled")
        self.backbone = self.bench.summarise(self.bench.score(self.run.backbone.model()))
        self.oracle = self.measured.measure_experts(self.config(), self.parts)["rows"]["oracle"]

    @property
    def parts(self) -> dict[str, Artifact]:
        """The experts by name."""
        return {f"expert-{index}": artifact for index, artifact in enumerate(self.experts)}

    @property
    def window(self) -> int:
        """Tokens T of a window."""
        return self.run.config.model.context_length

    def config(self, **settings: Any) -> Config:
        """Settings of the evidence router, with some changed."""
        return self.runs.config(self.seed, self.recipe, ROUTER | settings)

    def model(self, **settings: Any) -> Decoder:
        """The assembled model with the evidence router, or with other settings."""
        parts = {"backbone": self.run.backbone.artifact, **self.parts}
        return build_model(self.run, self.config(**settings), self.variant, parts)

    def changed(self, model: Decoder, change: Change) -> Decoder:
        """The model with its logits changed in every layer."""
        for index, layer in enumerate(moe_layers(model)):

            def apply(_module: Any, inputs: tuple[Tensor, ...], logits_NE: Tensor, index: int = index) -> Tensor:
                shape = (-1, self.window)
                logits_RTE, x_RTD = (item.reshape(*shape, item.shape[-1]) for item in (logits_NE, inputs[0].float()))
                return change(logits_RTE, x_RTD, index).reshape(logits_NE.shape)

            layer.gate.register_forward_hook(apply)
        return model

    def by_posterior(self, **settings: Any) -> dict[str, Tensor]:
        """Scores when every layer routes by the posterior that the experts' own likelihoods of the text so far give."""
        found: dict[str, Tensor] = {}
        for name, scores_KRT in self.scores.items():
            posterior_RTE = (scores_KRT.cumsum(2) - scores_KRT).log_softmax(0).permute(1, 2, 0)
            place = [0] * self.run.config.model.layers

            def route(
                logits: Tensor, _x: Tensor, layer: int, rows: Tensor = posterior_RTE, place: list[int] = place
            ) -> Tensor:
                start = place[layer]
                place[layer] += len(logits)
                return rows[start : start + len(logits)]

            found |= self.bench.score(self.changed(self.model(**settings), route), [name])
        return found

    def calibrated_on_training_text(self, **settings: Any) -> Decoder:
        """The model calibrated on the experts' partitions instead of on the fitting half of validation."""
        config, corpus, partitions = self.config(**settings), self.run.corpus, self.run.obtain("partition")
        streams = {str(k): np.asarray(partition_tokens(partitions, k).tokens) for k in range(len(self.experts))}
        _, decide = split_documents(corpus.tokens("validation"), corpus.labels)
        model, job = self.model(), Job("calibrate", config.calibration, config.training)
        seed = derived_seed(config.seed, "calibration order")
        calibrate(model, config, even_mixture(streams), decide, job, seed, World(device=model.lm_head.weight.device))
        return model

    def show(self, name: str, measured: Decoder | dict[str, Tensor]) -> None:
        """Print a line."""
        row = self.bench.summarise(self.bench.score(measured) if isinstance(measured, Decoder) else measured)
        print(
            f"{name:<55} {row['mean_loss']:.4f} {self.kept(row):>7}  "
            + "  ".join(f"{place} {self.kept(item, place)}" for place, item in row["positions"].items()),
            flush=True,
        )

    def kept(self, row: Any, place: str = "") -> str:
        """Share of the oracle's gain, in per cent."""
        here, first, last = (
            (row, self.backbone["positions"][place], self.oracle["positions"][place])
            if place
            else (row["mean_loss"], self.backbone["mean_loss"], self.oracle["mean_loss"])
        )
        return f"{(first - here) / (first - last):.1%}"


def plain_trials(trial: Trial) -> None:
    """What a better router could bring, and what other statistics bring."""
    config = trial.config(**{"assembly.router": "ridge", "assembly.router_temperature": 1.0})
    rows = [
        torch.from_numpy(item)
        for item in router_rows(config, trial.experts, trial.run.backbone.model().config).values()
    ]
    place_T = torch.arange(1, trial.window + 1)[:, None].float()

    def with_ridge(logits: Tensor, x: Tensor, layer: int, weight: float) -> Tensor:
        return logits + weight * (x[..., : rows[layer].shape[1]] @ rows[layer].T)

    def with_mean_ridge(logits: Tensor, x: Tensor, layer: int, weight: float) -> Tensor:
        ridge = x[..., : rows[layer].shape[1]] @ rows[layer].T
        return logits + weight * (ridge - ridge.mean(-1, keepdim=True)).cumsum(1) / place_T

    def shrunk_by(logits: Tensor, _x: Tensor, _layer: int, tokens: float) -> Tensor:
        return logits * place_T / (place_T + tokens)

    trial.show(
        "all experts' outputs by posterior (ensemble)",
        {name: posterior_ensemble(scores) for name, scores in trial.scores.items()},
    )
    every = {"assembly.experts_per_token": len(trial.experts)}
    trial.show("FFNs by posterior, all visited", trial.by_posterior(**every))
    trial.show("FFNs by posterior, top-2", trial.by_posterior())
    for tokens in (2.0, 4.0):
        trial.show(
            f"evidence shrunk as by {tokens:.0f} tokens without any",
            trial.changed(trial.model(), partial(shrunk_by, tokens=tokens)),
        )
    shrunk = trial.changed(trial.model(**every), partial(shrunk_by, tokens=4.0))
    trial.show("evidence shrunk as by 4 tokens, all visited", shrunk)
    for weight in (1.25, 2.5, 5.0):
        model = trial.changed(trial.model(), partial(with_ridge, weight=weight))
        trial.show(f"evidence + {weight} ridge of the token", model)
    for weight in (10.0, 30.0):
        model = trial.changed(trial.model(), partial(with_mean_ridge, weight=weight))
        trial.show(f"evidence + {weight:.0f} ridge, mean of the text so far", model)
    for rate in (1e-3, 3e-3):
        name = f"calibrated on training text, rate {rate:g}"
        trial.show(name, trial.calibrated_on_training_text(**{"calibration.peak_learning_rate": rate}))


def anchored_trials(trial: Trial) -> None:
    """The public expert always visited, beside the likeliest other, with equal weights: much as in their training."""

    def anchor(logits: Tensor, _x: Tensor, _layer: int) -> Tensor:
        return torch.cat([logits[..., 1:].amax(-1, keepdim=True), logits[..., 1:]], dim=-1)

    for router in ("evidence", "ridge"):
        settings = {"assembly.router": router, "assembly.public_expert": True}
        trial.show(f"{router}, public expert always visited", trial.changed(trial.model(**settings), anchor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="plain")
    options = parser.parse_args()
    trial = Trial(options.study, options.seed, options.recipe)
    losses = f"backbone {trial.backbone['mean_loss']:.4f}, oracle {trial.oracle['mean_loss']:.4f}"
    print(f"{losses}; then mean loss, share kept, and share kept by position")
    trial.show("evidence", trial.model())
    (anchored_trials if trial.run.config.experts.anchored else plain_trials)(trial)


if __name__ == "__main__":
    main()
