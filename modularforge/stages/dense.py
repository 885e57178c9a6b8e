"""The honest baseline: the backbone trained on, as a dense model, with all the tokens that the experts got together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from modularforge.artifacts import Backbone, Corpus, derived_seed, even_streams
from modularforge.config import Config
from modularforge.data.loader import batches
from modularforge.log import logger
from modularforge.model.folder import backbone_tensors, cast_like, save_tensors
from modularforge.pipeline import finished, plan_stage, require
from modularforge.provenance import commit, making
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import Batch, fit
from modularforge.training.losses import language_loss, mean_loss


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan = plan_stage(config, "dense")
    if finished(plan):
        logger.info("dense baseline is finished: %s", plan.url)
        return
    corpus, backbone = Corpus(require(config, "corpus")), Backbone(require(config, "backbone"))
    phase = config.experts.model_copy(update={"steps": config.experts.steps * config.experts.count})
    tokens, context = corpus.tokens("train").tokens, config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, "dense", phase, plan.fingerprint)
    model = backbone.model().float()
    with joined_world() as world:

        def batches_from(position: int) -> Iterator[Batch]:
            seed = derived_seed(config.seed, "dense order")
            return batches(tokens, context, phase.batch_size, seed, position, world.rank, world.size)

        def validate() -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        losses = fit(model, language_loss, job, batches_from, validate, world)
        if world.is_main:
            with making(plan) as writer:
                types = {name: tensor.dtype for name, tensor in backbone.tensors.items()}
                save_tensors(cast_like(backbone_tensors(model), types), writer.folder / "model.safetensors")
                for name in backbone.artifact.manifest.files:
                    if not name.endswith(".safetensors"):
                        shutil.copyfile(backbone.artifact.local_file(name), writer.folder / name)
                facts = {"training_tokens": phase.steps * phase.batch_size * context}
                commit(writer, plan, config, {**losses, **facts})
        world.barrier()
