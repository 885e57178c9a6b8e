"""What the stages do for the task `speech`: features for tokens, a projector for a backbone, transcripts for text.

Partitions, experts and assembly are those of every task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import Artifact, open_artifact, paths
from checkpoints.screen import say
from modularforge.calibration.calibrator import Calibration, calibrate_by, write_calibrated
from modularforge.config import Config, PhaseConfig
from modularforge.data.inputs import file_states, list_matches, record, warn_of_repeats
from modularforge.evaluation.results import checked_results, parse_results
from modularforge.experts.steering import FROZEN_FACT
from modularforge.experts.steering.training import steered
from modularforge.experts.trainable import Trainable, trainable
from modularforge.log import json_safe, logger
from modularforge.model.backbone import perplexity
from modularforge.model.hub_config import TOKENIZER_FILES
from modularforge.observe.evaluation import markdown
from modularforge.observe.table import Column, Table, decimals, name_column
from modularforge.pipeline import JobName, contents, wanted_stages
from modularforge.pretrained.fetch import local_model
from modularforge.provenance import commit, making, save_settings
from modularforge.run import Run, is_kept
from modularforge.speech.costs import costs
from modularforge.speech.folder import Parts, build_speech, load_speech, parts_in, parts_of, save_speech, shape_from
from modularforge.speech.model import SpeechModel
from modularforge.speech.prepare import prepare_speech
from modularforge.speech.records import is_folder
from modularforge.stage_outputs import Corpus, derived_seed
from modularforge.tasks.speech import SPEECH, HeldOutSpeech, gate_usage, held_out_speech, listing, measure, speech_file
from modularforge.tasks.task import Examples, examples_taken
from modularforge.training.distributed import World, default_device, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss
from modularforge.training.meter import peak_memory_bytes

RESULTS_NAME, REPORT_NAME, LISTING_NAME = "results.json", "report.md", "utterances.json"
CALIBRATION_NAME = "calibration.json"
RESULTS_FORMAT = "speech-1"
Row = dict[str, Any]


def corpus(run: Run) -> Artifact:
    """Compute features and write the utterances' files, unless that is done."""
    plan, config = run.plan("prepare-data"), run.config
    if found := run.finished(plan):
        logger.info("data is finished: %s", plan.url)
        return found
    matches = [match for match in list_matches(config) if not is_folder(match.url)]
    warn_of_repeats(matches)
    states = file_states(matches)
    with making(plan) as writer:
        start = time.perf_counter()
        pretrained = local_model(config.model.pretrained) if config.model.pretrained else None
        metadata = prepare_speech(config, writer.folder, pretrained)
        facts = {"seconds": round(time.perf_counter() - start, 3), "sources": record(matches, states)}
        facts |= {name: metadata[name] for name in ("labels", "splits", "dropped_utterances")}
        return commit(writer, plan, run, facts)


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
    device, phase, held_out = default_device(), config.calibration, SPEECH.validation(config, corpus)
    seed = derived_seed(config.seed, "calibration order")
    examples = replace(SPEECH.everything(config, corpus), batch_size=phase.batch_size, seed=seed)
    loss = partial(mean_loss, model.to(device), held_out, World(device=device))
    return calibrate_by(examples, model, config, loss, job, device), examples.taken(phase.steps)


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
    features: Row = {"kind": settings.features, "bins": settings.bins, "normalise": settings.normalise}
    statistics_2M = speech_file(run.config, run.corpus.artifact, "train").statistics
    if statistics_2M is not None:
        features["statistics"] = statistics_2M.tolist()
    save_speech(training.model, training.parts, folder, {**features, "end_token": run.corpus.end_token})
    artifact = run.corpus.artifact
    for name in TOKENIZER_FILES:
        if name in artifact.manifest.files:
            (folder / name).write_bytes(artifact.read_bytes(name))


def evaluation(run: Run) -> dict[str, Any]:
    """Transcribe the test utterances with every model that is there, and commit rates, report and worst utterances."""
    start, models = time.perf_counter(), dict(_models(run))
    inputs = {name: artifact.manifest.fingerprint for name, artifact in models.items()}
    inputs |= {"corpus": contents(run.require("prepare-data")), "format": RESULTS_FORMAT}
    plan = run.plan("evaluate", inputs=inputs)
    old = run.find(plan.url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        logger.info("evaluation is finished: %s", plan.url)
        results = parse_results(old.read_bytes(RESULTS_NAME), paths.join(old.url, RESULTS_NAME))
    else:
        found, listings = _measured(run, models)
        results = json_safe({**found, "seconds": round(time.perf_counter() - start, 3)})
        with making(plan) as writer:
            writer.write_json(RESULTS_NAME, results)
            writer.write_json(LISTING_NAME, json_safe(listings))
            lines = [markdown(results), "## Error rates", "", *rate_table(results).markdown(), ""]
            (writer.folder / REPORT_NAME).write_text("\n".join(lines), encoding="utf-8")
            commit(writer, plan, run, {"chosen": results["chosen"]}, old)
    rate_table(results).show(None)
    say("")
    return checked_results(results)


def measure_folder(run: Run, url: str) -> Table:
    """Error rates of one model folder on this config's test utterances, without writing anything."""
    folder = open_artifact(url).local_folder() if "://" in url else Path(url)
    row, _ = measured_row(load_speech(folder), held_out_speech(run.config, run.corpus), default_device())
    name = url.rstrip("/").rsplit("/", 1)[-1]
    return rate_table({"name": run.config.name, "domains": list(row["domains"]), "models": {name: row}})


def _models(run: Run) -> Iterator[tuple[str, Artifact]]:
    """The committed models by job, in the order of the stages."""
    run.require("backbone")
    for stage in wanted_stages(run.config):
        if stage.is_measured:
            for index in stage.indices(run.config):
                artifact = run.artifact(stage.name, index)
                if artifact and is_kept(artifact):
                    yield str(JobName(stage.kind, index)), artifact


def _measured(run: Run, models: dict[str, Artifact]) -> tuple[Row, Row]:
    config, device = run.config, default_device()
    held_out = held_out_speech(config, run.corpus)
    rows: dict[str, Row] = {}
    listings: Row = {}
    for name, artifact in models.items():
        is_expert = JobName.parse(name).stage == "expert"
        model = run.backbone.expert(artifact) if is_expert else load_speech(artifact.local_folder())
        row, listings[name] = measured_row(model, held_out, device)
        rows[name] = row | _costs(models, name)
        logger.info("%s: word error rate %.3f, mean test loss %.4f", name, rows[name]["wer"], rows[name]["mean_loss"])
    experts = {name: row for name, row in rows.items() if JobName.parse(name).stage == "expert"}
    if experts:
        rows["oracle"] = oracle_row(experts) | costs([models["backbone"], *map(models.__getitem__, experts)])
    last = [name for name in ("assembled", "calibrated") if name in rows]
    order = [name for name in rows if name not in last] + last
    found = {
        "name": config.name,
        "domains": list(held_out.domains),
        "models": {name: rows[name] for name in order},
        "chosen": last[-1] if last else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    routing: Row = {}
    if "assembled" in models:
        names = [str(JobName("expert", index)) for index in range(config.experts.count)]
        kept = [name for name in names if name in models["assembled"].manifest.inputs]
        routing = _routing(load_speech(models["assembled"].local_folder()), held_out, device, kept)
    calibration = run.find(run.url("calibrate"))
    facts = calibration.manifest.facts if calibration else {}
    told = {key: facts[key] for key in ("kept", "loss_before", "loss_after") if key in facts}
    empty: Row = {"routing": routing, "samples": {}, "differences": {}, "calibration": told if len(told) > 1 else None}
    return {**found, **empty}, listings


def _costs(models: Mapping[str, Artifact], name: str) -> Row:
    """What went into a model: its own job's, those of the experts that it is made of, and the projector's."""
    stacked = models["assembled" if name == "calibrated" else name].manifest.inputs
    made_of = [models[other] for other in stacked if JobName.parse(other).stage == "expert"]
    own = [models[name]] if name not in ("backbone", "assembled") else []
    return costs([models["backbone"], *own, *made_of])


def measured_row(model: Any, held_out: HeldOutSpeech, device: torch.device) -> tuple[Row, Row]:
    """What one model got right, and its worst utterances."""
    measured = measure(model, held_out, device)
    domains = {label: row for label, (row, _) in measured.items()}
    learned = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith(FROZEN_NAMES))
    return {**_means(domains), "parameters": learned, "active_parameters": learned, "training_tokens": None}, listing(
        measured, held_out.listed
    )


def _routing(model: SpeechModel, held_out: HeldOutSpeech, device: torch.device, experts: list[str]) -> Row:
    """How much each expert weighs, by domain and by site; nothing for a model of one expert."""
    if model.steering is None or model.steering.shape.experts < 2:
        return {}
    found = gate_usage(model, held_out, device)
    shares = torch.stack([usage.share_LK for usage in found.values()])
    balance_L = torch.stack([usage.evenness_L for usage in found.values()]).mean(dim=0)
    by_domain = {label: usage.share_LK.mean(dim=0).tolist() for label, usage in found.items()}
    summary = {
        "share_per_layer_and_expert": shares.mean(dim=0).tolist(),
        "share_per_domain_and_expert": by_domain,
        "weight_per_domain_and_expert": by_domain,
        "balance_per_layer": balance_L.tolist(),
        "experts": experts,
    }
    return {"assembled": summary}


FROZEN_NAMES = ("encoder.", "decoder.")
RATES = ("wer", "cer", "token_accuracy", "string_accuracy")


def _means(domains: dict[str, Row]) -> Row:
    """Means over the domains, which weigh alike."""
    means = {name: sum(row[name] for row in domains.values()) / len(domains) for name in RATES}
    loss, bits = (sum(row[name] for row in domains.values()) / len(domains) for name in ("loss", "bits_per_byte"))
    shared = {"mean_loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, "positions": {}, "probes": {}}
    return {**shared, **means, "domains": domains}


def oracle_row(experts: dict[str, Row]) -> Row:
    """The best expert of each domain by its loss on the test utterances themselves: a bound, no model."""
    labels = next(iter(experts.values()))["domains"]
    best = {label: min((row["domains"][label] for row in experts.values()), key=_loss) for label in labels}
    return {**_means(best), "parameters": None, "active_parameters": None, "training_tokens": None}


def _loss(row: Row) -> float:
    return float(row["loss"])


def rate_table(results: Row) -> Table:
    """Word error rates by domain, and the other rates in the mean."""

    def of_domain(label: str) -> Callable[[tuple[str, Any]], Any]:
        return lambda record: 100 * record[1]["domains"][label]["wer"]

    def mean_of(name: str) -> Callable[[tuple[str, Any]], Any]:
        return lambda record: 100 * record[1][name]

    columns = [
        name_column("model"),
        *(Column(f"WER {label}", of_domain(label), decimals(1)) for label in results["domains"]),
        *(Column(f"{name.replace('_', ' ')} %", mean_of(name), decimals(1)) for name in RATES),
    ]
    title = f"{results['name']}: error rates (lower is better) and accuracies in percent"
    return Table(columns, [*results["models"].items()], title)
