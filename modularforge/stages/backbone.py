"""Train the backbone on everything, alone or with DDP under torchrun, and commit it as a Hugging Face folder.

With `model.pretrained` it starts from that model, and with `backbone.steps` 0 it is that model, byte for byte.
"""

from __future__ import annotations

from checkpoints import Artifact
from modularforge.log import logger
from modularforge.model.hub_config import TOKENIZER_NAME, read_config, special_ids
from modularforge.pretrained.fetch import local_model
from modularforge.pretrained.shape import check_shape
from modularforge.pretrained.sources import published_name
from modularforge.provenance import commit, making, save_settings
from modularforge.routing.text_counts import COUNTS_NAME
from modularforge.run import Run
from modularforge.tasks.task import examples_facts, task_of
from modularforge.training.backbone_job import save_backbone, train_backbone
from modularforge.training.distributed import joined_world
from modularforge.training.job import Job


def run(run: Run) -> Artifact:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan, config = run.plan("backbone"), run.config
    if found := run.finished(plan):
        logger.info("backbone is finished: %s", plan.url)
        return found
    corpus, task = run.corpus, task_of(config)
    examples = task.everything(config, corpus)
    held_out = task.validation(config, corpus)
    job = Job.of_run(config, "backbone", config.backbone, plan.fingerprint)
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        if pretrained is not None:  # resolved settings are not compared with it where they are read
            check_shape(config.model.model_dump(mode="json"), read_config(pretrained), str(config.model.pretrained))
        sizes = config, corpus.vocab_size
        model, losses = train_backbone(*sizes, task.loss, job, examples, held_out, world, pretrained)
        if world.is_main:
            with making(plan) as writer:
                statistics = task.statistics(model, examples, world.device)
                facts = save_backbone(config, model, writer.folder, corpus.tokenizer, statistics, pretrained)
                special = special_ids(read_config(writer.folder), (writer.folder / TOKENIZER_NAME).read_bytes())
                task.save_counts(config, examples, model.vocab_size, special, writer.folder / COUNTS_NAME)
                data = {name: corpus.artifact.manifest.facts.get(name) for name in ("labels", "splits")}
                if config.model.pretrained:
                    hub = published_name(config.model.pretrained)
                    facts["pretrained"] = {"hub": hub, "identity": plan.inputs["pretrained"]}
                commit(writer, plan, run, {**losses, **facts, **examples_facts(examples), "data": data})
        world.barrier()
    return run.made("backbone")
