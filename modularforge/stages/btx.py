"""The second phase of the BTX baseline (arXiv 2403.07816): the merged branches trained on, on all partitions mixed.

The rows start from the solved ones of the merge, not from random ones: that can only help the baseline.
"""

from __future__ import annotations

import copy
from functools import partial

from checkpoints import Artifact
from modularforge.artifacts import Backbone
from modularforge.config import Config
from modularforge.evaluation.btx import build_btx, solved_router
from modularforge.experts.trainable import trainable
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.pipeline import require
from modularforge.tasks.task import task_of
from modularforge.training.backbone_job import save_mixture
from modularforge.training.losses import RoutedLoss
from modularforge.training.mixed_job import Start, run_mixed


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""

    def start(backbone: Backbone, _partitions: Artifact) -> Start:
        branches = [require(config, "branch", index) for index in range(config.experts.count)]
        # A copy: these tensors become the parameters, and training must not reach the backbone's.
        model = copy.deepcopy(build_btx(solved_router(config), backbone, branches)).float()
        choose_trained(model, config.btx.trains)
        loss = RoutedLoss(model, task_of(config).loss, config.experts.z_loss, config.joint.balance_loss)
        return Start(trainable(model, loss), partial(save_mixture, model, backbone))

    seen = config.experts.steps * config.experts.batch_size
    run_mixed(config, "btx", config.btx_phase, start, skipped_windows=seen)


def choose_trained(model: Decoder, trains: str) -> None:
    """Let only those parameters require gradients that `btx.trains` names."""
    for name, weight in model.named_parameters():
        is_expert = names.expert_position(name) is not None
        weight.requires_grad_(trains == "all" or names.is_gate(name) or (trains == "shared" and not is_expert))
