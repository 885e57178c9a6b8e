"""What the stages do for the task `speech`: features for tokens, a projector for a backbone, transcripts for text.

Partitions, experts and assembly are those of every task.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import Artifact
from modularforge.calibration.calibrator import Calibration, calibrate_by, write_calibrated
from modularforge.config import Config, PhaseConfig
from modularforge.data.inputs import file_states, list_matches, record, warn_of_repeats
from modularforge.data.prepare import own_scratch, remove_scratch, scratch_folder
from modularforge.experts.steering import FROZEN_FACT
from modularforge.experts.steering.training import steered
from modularforge.experts.trainable import Trainable, trainable
from modularforge.log import logger
from modularforge.model.hub_config import TOKENIZER_FILES
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making, save_settings
from modularforge.run import Run
from modularforge.speech.encoder_files import check_features
from modularforge.speech.folder import Parts, build_speech, load_speech, parts_in, parts_of, save_speech, shape_from
from modularforge.speech.model import SpeechModel
from modularforge.speech.prepare import describe_speech, prepare_speech
from modularforge.speech.records import is_folder
from modularforge.stage_outputs import Corpus, derived_seed
from modularforge.tasks.speech import SPEECH, speech_file
from modularforge.tasks.task import Examples, examples_taken
from modularforge.training.distributed import World, default_device, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss

CALIBRATION_NAME = "calibration.json"
Row = dict[str, Any]


def corpus(run: Run) -> Artifact:
    """Compute features and write the utterances' files, unless that is done."""
    plan, config = run.plan("prepare-data"), run.config
    scratch = scratch_folder(plan.url, plan.fingerprint)
    if found := run.finished(plan):
        logger.info("data is finished: %s", plan.url)
        remove_scratch(scratch)  # of a preparation that was killed right after its commit
        return found
    check_features(config.speech)  # before hours of work
    matches = [match for match in list_matches(config) if not is_folder(match.url)]
    warn_of_repeats(matches)
    states = file_states(matches)
    with making(plan) as writer:
        start = time.perf_counter()
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        work = own_scratch(scratch, describe_speech(config, states))
        metadata = prepare_speech(config, writer.folder, pretrained, work)
        facts = {"seconds": round(time.perf_counter() - start, 3), "sources": record(matches, states)}
        facts |= {name: metadata[name] for name in ("labels", "splits", "dropped_utterances")}
        made = commit(writer, plan, run, facts)
    remove_scratch(scratch)
    return made


@dataclass(frozen=True)
class Training:
    """What a job trains, on what, with which frozen parts."""

    trainable: Trainable
    examples: Examples
    parts: Parts

    @property
    def model(self) -> SpeechModel:
        """The model, by its own class."""
        assert isinstance(self.trainable.model, SpeechModel)
        return self.trainable.model


def projector(run: Run) -> Artifact:
    """The speech run's backbone: the projector trained on everything (called on every rank; rank 0 writes)."""
    config = run.config

    def start() -> Training:
        parts = parts_of(config, run.corpus.vocab_size)
        model = build_speech(shape_from(config, None, "static"), parts)
        return Training(trainable(model, SPEECH.loss), SPEECH.everything(config, run.corpus), parts)

    return _train(run, "backbone", config.backbone, start)


def static(run: Run) -> Artifact:
    """The baseline `dense`: the projector trained on, on all that the experts see, without any steering."""
    phase = run.config.baseline_phase("dense")

    def start() -> Training:
        folder = run.require("backbone").local_folder()
        return Training(trainable(load_speech(folder), SPEECH.loss), _mixture(run, "dense", phase), parts_in(folder))

    return _train(run, "dense", phase, start)


def joint(run: Run) -> Artifact:
    """The original's training: as many vectors (or as large a rank) as all experts have, jointly on all they see."""
    phase, config = run.config.baseline_phase("joint"), run.config

    def start() -> Training:
        backbone = run.require("backbone")
        settings, count = config.steering, config.experts.count
        trained = steered(settings, backbone, count, SPEECH.loss, settings.joint_projector)
        return Training(trained, _mixture(run, "joint", phase), parts_in(backbone.local_folder()))

    return _train(run, "joint", phase, start)


def calibrated(run: Run) -> Artifact:
    """Calibrate the assembled model where `steering.calibrates` says so; else say that it is the one to use."""
    plan, config = run.plan("calibrate"), run.config
    if found := run.finished(plan):
        return found
    if not config.steering.calibrates:
        with making(plan) as writer:
            writer.write_json(CALIBRATION_NAME, {"kept": False})
            return commit(writer, plan, run, {"kept": False})
    assembled, clock = run.require("assemble"), time.perf_counter()
    job = replace(Job.of_run(config, "calibrate", config.calibration, plan.fingerprint), checkpoint_url=None)
    result, taken = calibrate_speech(load_speech(assembled.local_folder()), config, run.corpus, job)
    logger.info("calibration: held-out loss %.4f before, %.4f after", result.before, result.after)
    with making(plan) as writer:
        writer.write_json(CALIBRATION_NAME, result.facts)
        if result.kept:
            write_calibrated(assembled, result, writer, config.assembly.max_shard_bytes)
        seconds = round(time.perf_counter() - clock, 3)
        return commit(writer, plan, run, {**result.facts, **taken, "training_seconds": seconds})


def calibrate_speech(model: SpeechModel, config: Config, corpus: Corpus, job: Job) -> tuple[Calibration, Row]:
    """Train router rows and scales on training utterances, judged by the validation ones; and what was heard for it."""
    phase, held_out = config.calibration, SPEECH.validation(config, corpus)
    world = World(device=default_device())
    seed = derived_seed(config.seed, "calibration order")
    examples = replace(SPEECH.everything(config, corpus), batch_size=phase.batch_size, seed=seed)
    loss = partial(mean_loss, model.to(world.device), held_out, world)
    return calibrate_by(examples, model, config, loss, job, world), examples.taken(phase.steps)


def _mixture(run: Run, name: str, phase: PhaseConfig) -> Examples:
    return SPEECH.mixture(run.config, run.require("partition"), name, phase)


def _train(run: Run, name: str, phase: PhaseConfig, start: Callable[[], Training]) -> Artifact:
    """Train a whole model and commit its folder, unless it is done."""
    plan, config = run.plan(name), run.config
    if found := run.finished(plan):
        logger.info("%s is finished: %s", name, plan.url)
        return found
    held_out = SPEECH.validation(config, run.corpus)
    job = Job.of_run(config, name, phase, plan.fingerprint)
    torch.manual_seed(derived_seed(config.seed, f"{name} weights"))
    begun = start()
    with joined_world() as world:
        if world.is_main:
            save_settings(config)
        validate = partial(mean_loss, begun.model, held_out, world)
        clock = time.perf_counter()
        losses = fit(begun.trainable, begun.examples, job, validate, world)
        seconds = round(time.perf_counter() - clock, 3)
        if world.is_main:
            with making(plan) as writer:
                _write(run, begun, writer.folder)
                trained = sum(weight.numel() for weight in begun.trainable.parameters.values())
                frozen = {"encoder": begun.parts.encoder.identity, "decoder": begun.parts.decoder.identity}
                data = {name: run.corpus.artifact.manifest.facts.get(name) for name in ("labels", "splits")}
                facts = {**losses, "parameters": trained, FROZEN_FACT: frozen, "data": data}
                taken = examples_taken(begun.examples, int(losses.get("steps") or phase.steps))
                commit(writer, plan, run, {**facts, **taken, "training_seconds": seconds})
        world.barrier()
    return run.made(name)


def _write(run: Run, training: Training, folder: Path) -> None:
    """A model folder, with the tokenizer of the language model."""
    settings = run.config.speech.data
    normalise = "file" if settings.statistics_file else settings.normalise
    features: Row = {"kind": settings.features, "bins": settings.bins, "normalise": normalise}
    statistics_2M = speech_file(run.config, run.corpus.artifact, "train").statistics
    if statistics_2M is not None:
        features["statistics"] = statistics_2M.tolist()
    save_speech(training.model, training.parts, folder, {**features, "end_token": run.corpus.end_token})
    artifact = run.corpus.artifact
    for name in TOKENIZER_FILES:
        if name in artifact.manifest.files:
            (folder / name).write_bytes(artifact.read_bytes(name))
