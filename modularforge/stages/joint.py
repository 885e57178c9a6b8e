"""The joint baseline: a mixture of the assembled model's shape, trained as one model on the experts' tokens."""

from __future__ import annotations

from functools import partial

import torch

from checkpoints import Artifact
from modularforge.artifacts import Backbone, derived_seed
from modularforge.config import Config
from modularforge.training.joint import build_joint, save_mixture
from modularforge.training.losses import JointLoss
from modularforge.training.mixed_job import Start, run_mixed


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""

    def start(backbone: Backbone, _partitions: Artifact) -> Start:
        torch.manual_seed(derived_seed(config.seed, "joint weights"))
        experts, active = config.joint_experts, config.assembly.experts_per_token
        model = build_joint(backbone.tensors, backbone.values, experts, active, config.joint.freeze_shared)
        loss_of = JointLoss(model, config.experts.z_loss, config.joint.balance_loss)
        return Start(model, loss_of, partial(save_mixture, model, backbone))

    run_mixed(config, "joint", config.baseline_phase("joint"), start)
