"""Train the backbone on everything, alone or with DDP under torchrun, and commit it as a Hugging Face folder.

With `model.pretrained` it starts from that model, and with `backbone.steps` 0 it is that model, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator

from modularforge.artifacts import Corpus, derived_seed, even_streams
from modularforge.assembly.small_files import TOKENIZER_NAME, special_ids
from modularforge.config import Config
from modularforge.data.loader import batches
from modularforge.log import logger
from modularforge.model.backbone import Decoder
from modularforge.model.hub_config import read_config
from modularforge.pipeline import finished, plan_stage, require
from modularforge.pretrained.fetch import local_model
from modularforge.pretrained.sources import published_name
from modularforge.provenance import commit, making, save_settings
from modularforge.routing.text_counts import COUNTS_NAME, counts_of, save_counts
from modularforge.training.backbone_job import sample_windows, save_backbone, train_backbone
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job
from modularforge.training.loop import Batch
from modularforge.training.losses import mean_loss


def run(config: Config) -> None:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan = plan_stage(config, "backbone")
    if finished(plan):
        logger.info("backbone is finished: %s", plan.url)
        return
    corpus = Corpus(require(config, "corpus"))
    tokens, context = corpus.tokens("train").tokens, config.model.context_length
    held_out = even_streams(corpus.domains("validation"), config.training.validation_tokens)
    job = Job.of_run(config, "backbone", config.backbone, plan.fingerprint)
    with joined_world() as world:
        if world.is_main:
            save_settings(config)

        def batches_from(position: int) -> Iterator[Batch]:
            seed = derived_seed(config.seed, "backbone order")
            return batches(tokens, context, config.backbone.batch_size, seed, position, world.rank, world.size)

        def validate(model: Decoder) -> float:
            return mean_loss(model, held_out, context, config.evaluation.batch_size, world)

        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        model, losses = train_backbone(config, corpus.vocab_size, job, batches_from, validate, world, pretrained)
        if world.is_main:
            stream = batches(tokens, context, 1, derived_seed(config.seed, "backbone statistics"))
            windows = config.experts.statistics_tokens // context
            sample = sample_windows(stream, windows, config.evaluation.batch_size)
            with making(plan) as writer:
                facts = save_backbone(config, model, writer.folder, corpus.tokenizer, sample, world, pretrained)
                special = special_ids(read_config(writer.folder), (writer.folder / TOKENIZER_NAME).read_bytes())
                save_counts(writer.folder / COUNTS_NAME, counts_of(config, tokens, model.vocab_size, special))
                data = {name: corpus.artifact.manifest.facts.get(name) for name in ("labels", "splits")}
                if config.model.pretrained:
                    hub = published_name(config.model.pretrained)
                    facts["pretrained"] = {"hub": hub, "identity": plan.inputs["pretrained"]}
                commit(writer, plan, config, {**losses, **facts, "data": data})
        world.barrier()
