"""The honest baselines: the backbone trained on, as a dense model, with the very tokens that the experts get.

`dense` has the backbone's shape. `dense_wide` has as many active feed-forward weights as the assembled model: its FFN
is widened, without a change of what it computes, to the width that a token visits there.
"""

from __future__ import annotations

from functools import partial

import torch

from checkpoints import Artifact
from modularforge.artifacts import Backbone, derived_seed
from modularforge.config import Config
from modularforge.experts.trainable import trainable
from modularforge.model.upcycling import build_wide
from modularforge.tasks.task import task_of
from modularforge.training.backbone_job import save_trained_on
from modularforge.training.mixed_job import Start, run_mixed


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""

    def start(backbone: Backbone, _partitions: Artifact) -> Start:
        model = backbone.model().float()
        return Start(trainable(model, task_of(config).loss), partial(save_trained_on, model, backbone))

    run_mixed(config, "dense", config.baseline_phase("dense"), start)


def run_wide(config: Config) -> None:
    """The same for the wide one."""

    def start(backbone: Backbone, _partitions: Artifact) -> Start:
        torch.manual_seed(derived_seed(config.seed, "dense_wide weights"))
        model = build_wide(backbone.tensors, backbone.values, config.assembly.experts_per_token)
        return Start(trainable(model, task_of(config).loss), partial(save_trained_on, model, backbone))

    run_mixed(config, "dense_wide", config.baseline_phase("dense_wide"), start)
