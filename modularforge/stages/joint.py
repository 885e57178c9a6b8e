"""The joint baseline: a mixture of the assembled model's shape, trained as one model on the experts' tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from modularforge.artifacts import Backbone, Corpus, derived_seed, even_streams
from modularforge.assembly.small_files import copy_text_files
from modularforge.config import Config
from modularforge.log import logger
from modularforge.model import names
from modularforge.model.backbone import Decoder
from modularforge.model.folder import backbone_tensors, save_tensors
from modularforge.model.hub_config import CONFIG_NAME, WEIGHTS_NAME, moe_config, write_json
from modularforge.pipeline import finished, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.joint import build_joint
from modularforge.training.loop import fit
from modularforge.training.losses import JointLoss, mean_loss
from modularforge.training.mixture import mixed_partitions


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan = plan_stage(config, "joint")
    if finished(plan):
        logger.info("joint baseline is finished: %s", plan.url)
        return
    corpus, backbone = Corpus(require(config, "corpus")), Backbone(require(config, "backbone"))
    partitions, phase, context = require(config, "partitions"), config.joint_phase, config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, "joint", phase, plan.fingerprint)
    torch.manual_seed(derived_seed(config.seed, "joint weights"))
    experts, active = config.assembled_experts, config.assembly.experts_per_token
    model = build_joint(backbone.tensors, backbone.values, experts, active, config.joint.freeze_shared)
    loss_of = JointLoss(model, config.experts.z_loss, config.joint.balance_loss)
    with joined_world() as world:

        def validate() -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        losses = fit(model, loss_of, job, mixed_partitions(config, partitions, "joint", world), validate, world)
        if world.is_main:
            with making(plan) as writer:
                save_tensors(_stored(model, backbone), writer.folder / WEIGHTS_NAME)
                values = moe_config(model.config, model.vocab_size, experts, active, backbone.values)
                write_json(writer.folder / CONFIG_NAME, values)
                copy_text_files(backbone.artifact, writer.folder)
                facts = {"training_tokens": phase.steps * phase.batch_size * context}
                commit(writer, plan, config, {**losses, **facts})
        world.barrier()


def _stored(model: Decoder, backbone: Backbone) -> dict[str, Tensor]:
    """The weights in the type of the backbone's; router rows stay float32."""
    dtype = backbone.tensors[names.EMBEDDING].dtype
    tensors = backbone_tensors(model)
    return {name: tensor if names.is_gate(name) else tensor.to(dtype) for name, tensor in tensors.items()}
