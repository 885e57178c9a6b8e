"""The joint baselines: a mixture of the assembled model's shape, trained as one model on the experts' tokens.

`joint` trains a router with it. `joint_evidence` routes by the same evidence as the assembled model, from counts of the
partitions alone, so that the two differ in nothing but whether the experts were trained together.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from checkpoints import Artifact
from modularforge.artifacts import Backbone, derived_seed, token_file
from modularforge.assembly.card import special_tokens
from modularforge.config import Config
from modularforge.experts.trainable import trainable
from modularforge.model.folder import with_text_router
from modularforge.model.hub_config import TABLES_NAME, end_tokens
from modularforge.model.upcycling import build_joint, without_rows
from modularforge.routing.text_counts import COUNTS_NAME, counts_of, load_counts
from modularforge.routing.text_evidence import Texts, write_tables
from modularforge.tasks.task import task_of
from modularforge.training.backbone_job import save_mixture
from modularforge.training.losses import RoutedLoss
from modularforge.training.mixed_job import Start, run_mixed


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""

    def start(backbone: Backbone, _partitions: Artifact) -> Start:
        torch.manual_seed(derived_seed(config.seed, "joint weights"))
        experts, active = config.joint_experts, config.assembly.experts_per_token
        model = build_joint(backbone.tensors, backbone.values, experts, active, config.joint.freeze_shared)
        loss = RoutedLoss(model, task_of(config).loss, config.experts.z_loss, config.joint.balance_loss)
        return Start(trainable(model, loss), partial(save_mixture, model, backbone))

    run_mixed(config, "joint", config.baseline_phase("joint"), start)


def run_evidence(config: Config) -> None:
    """The same for the mixture that is routed by evidence; there is no loss of a router, since none is trained."""

    def start(backbone: Backbone, partitions: Artifact) -> Start:
        torch.manual_seed(derived_seed(config.seed, "joint weights"))
        experts, active = config.joint_experts, config.assembly.experts_per_token
        model = build_joint(backbone.tensors, backbone.values, experts, active, config.joint.freeze_shared)
        tables = _tables(config, backbone, partitions)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / TABLES_NAME
            path.write_bytes(tables)
            model = with_text_router(without_rows(model), path)

        def save(folder: Path) -> None:
            save_mixture(model, backbone, folder)
            (folder / TABLES_NAME).write_bytes(tables)

        # Tables send all layers the same way, so that an expert may get no token of a rank's batch in any of them.
        return Start(trainable(model, task_of(config).loss, may_skip_parameters=True), save)

    run_mixed(config, "joint_evidence", config.baseline_phase("joint_evidence"), start)


def _tables(config: Config, backbone: Backbone, partitions: Artifact) -> bytes:
    """The text router's file, as it would be for experts that were trained on these partitions."""
    special, size = special_tokens(backbone.artifact), int(backbone.values["vocab_size"])
    streams = [token_file(partitions, f"partition-{index}").tokens for index in range(config.experts.count)]
    counts = [counts_of(config, tokens, size, special) for tokens in streams]
    is_counted = COUNTS_NAME in backbone.artifact.manifest.files
    background = load_counts(backbone.artifact.local_file(COUNTS_NAME)) if is_counted else None
    texts = Texts(counts, background, special, end_tokens(backbone.values))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / TABLES_NAME
        write_tables(path, texts, config.joint_experts > config.experts.count, config.assembly.token_pairs)
        return path.read_bytes()
