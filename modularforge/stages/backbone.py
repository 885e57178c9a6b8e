"""Train the backbone on everything, alone or with DDP under torchrun, and commit it as a Hugging Face folder.

With `model.pretrained` it starts from that model, and with `backbone.steps` 0 it is that model, byte for byte.
"""

from __future__ import annotations

from checkpoints import Artifact
from modularforge.config import FEW_TOKENS, Config
from modularforge.log import logger
from modularforge.model.hub_config import TOKENIZER_NAME, read_config, special_ids
from modularforge.model.shards import in_company
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
from modularforge.training.precision import measuring


def run(run: Run) -> Artifact:
    """Train and commit unless it is done (called on every rank; rank 0 writes)."""
    plan, config = run.plan("backbone"), run.config
    if found := run.finished(plan):
        logger.info("backbone is finished: %s", plan.url)
        return found
    corpus, task, looks = run.corpus, task_of(config), _looks(config)
    examples = task.everything(looks, corpus)
    held_out = task.validation(looks, corpus)
    job = Job.of_run(config, "backbone", config.backbone, plan.fingerprint)
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        if pretrained is not None:  # resolved settings are not compared with it where they are read
            check_shape(config.model.model_dump(mode="json"), read_config(pretrained), str(config.model.pretrained))
        sizes = config, corpus.vocab_size
        model, losses = train_backbone(*sizes, task.loss, job, examples, held_out, world, pretrained)
        with in_company(model, world.total):
            if world.is_main:
                with making(plan) as writer:
                    with measuring(config.training, world.device):
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


def _looks(config: Config) -> Config:
    """The settings by which a backbone is looked at when it is done: those of the run, but for one of no steps.

    A model that is taken as it is would else cost more than all that is trained on it. The only routers that begin with
    its sums are those of anchored experts.
    """
    if config.backbone.steps:
        return config
    training = config.training.model_copy(
        update={"validation_tokens": min(config.training.validation_tokens, FEW_TOKENS)}
    )
    if config.experts.anchored:
        return config.model_copy(update={"training": training})
    experts = config.experts.model_copy(update={"statistics": "norms"})
    return config.model_copy(update={"training": training, "experts": experts})
