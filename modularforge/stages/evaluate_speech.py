"""Transcribe the test utterances with every model of a speech run: error rates, worst utterances, and what gates do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoints import Artifact, open_artifact, paths
from modularforge.config import SpeechTestConfig
from modularforge.evaluation.results import checked_results, parse_results
from modularforge.log import json_safe, logger
from modularforge.model.backbone import perplexity
from modularforge.observe.evaluation import markdown
from modularforge.pipeline import JobName, contents, wanted_stages
from modularforge.provenance import commit, making
from modularforge.run import Run, is_kept
from modularforge.speech.benchmarks import identity_of_sets, set_at, write_test_set
from modularforge.speech.costs import costs
from modularforge.speech.folder import load_speech
from modularforge.speech.gates import GateReader
from modularforge.speech.model import SpeechModel
from modularforge.tasks.speech import HeldOutSpeech, gates_of, held_out_speech, held_out_test, listing, measure
from modularforge.training.distributed import default_device
from modularforge.training.meter import peak_memory_bytes
from modularforge.training.precision import measuring

RESULTS_NAME, REPORT_NAME, LISTING_NAME = "results.json", "report.md", "utterances.json"
RESULTS_FORMAT = "speech-2"
FROZEN_NAMES = ("encoder.", "decoder.")
RATES = ("wer", "cer", "token_accuracy", "string_accuracy")
Row = dict[str, Any]
Tests = Mapping[str, HeldOutSpeech]


def run(run: Run) -> Row:
    """Measure what is there, and commit results, report and worst utterances."""
    start, models = time.perf_counter(), dict(_models(run))
    inputs = {name: artifact.manifest.fingerprint for name, artifact in models.items()}
    inputs |= {
        "corpus": contents(run.require("prepare-data")),
        "format": RESULTS_FORMAT,
        **identity_of_sets(run.config),
    }
    plan = run.plan("evaluate", inputs=inputs)
    old = run.find(plan.url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        logger.info("evaluation is finished: %s", plan.url)
        return parse_results(old.read_bytes(RESULTS_NAME), paths.join(old.url, RESULTS_NAME))
    with _tests(run, run.config.speech.decoding.tests or ()) as tests:
        found, listings = _measured(run, models, tests)
    results: Row = json_safe({**found, "seconds": round(time.perf_counter() - start, 3)})
    with making(plan) as writer:
        writer.write_json(RESULTS_NAME, results)
        writer.write_json(LISTING_NAME, json_safe(listings))
        (writer.folder / REPORT_NAME).write_text(markdown(results), encoding="utf-8")
        commit(writer, plan, run, {"chosen": results["chosen"]}, old)
    return checked_results(results)


def measure_folder(run: Run, url: str, place: str | None = None) -> Row:
    """Results of one model folder, or of an expert, on the run's test utterances, or on a test set at a `place`.

    Nothing is written.
    """
    start, device, config = time.perf_counter(), default_device(), run.config
    name, model = url.rstrip("/").rsplit("/", 1)[-1], _load(run, url)
    with _tests(run, [set_at(place)] if place else config.speech.decoding.tests or ()) as tests:
        held_out = next(iter(tests.values())) if place else held_out_speech(config, run.corpus)
        with measuring(config.training, device):
            row, listings, _ = measured_row(model, held_out, {} if place else tests, device)
    found = {"models": {name: row}, "chosen": name, "routing": {}, "errors": _worst(listings)}
    shared = {"name": config.name, "task": config.task, "domains": list(held_out.domains), "samples": {}}
    facts = {"peak_memory_bytes": peak_memory_bytes(device), "seconds": round(time.perf_counter() - start, 3)}
    return checked_results(json_safe({**shared, **found, **facts}))


def _load(run: Run, url: str) -> SpeechModel:
    """The model at a URL: a folder of its own, or an expert of this run."""
    artifact = run.find(url)
    if artifact is not None and artifact.manifest.kind == "expert":
        expert: Any = run.backbone.expert(artifact)
        return expert  # type: ignore[no-any-return]
    return load_speech(open_artifact(url).local_folder() if "://" in url else Path(url))


@contextmanager
def _tests(run: Run, tests: list[SpeechTestConfig] | tuple[()]) -> Iterator[Tests]:
    """Test sets by name, whose features lie in a temporary folder."""
    corpus = run.corpus
    with tempfile.TemporaryDirectory(prefix="modularforge-tests-", ignore_cleanup_errors=True) as scratch:
        found = {}
        for number, test in enumerate(tests):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            file = write_test_set(run.config, corpus.artifact, corpus.tokenizer, corpus.end_token, test, folder)
            found[test.name] = held_out_test(run.config, corpus, test.name, file)
        yield found


def _models(run: Run) -> Iterator[tuple[str, Artifact]]:
    """The committed models by job, in the order of the stages."""
    run.require("backbone")
    for stage in wanted_stages(run.config):
        if stage.is_measured:
            for index in stage.indices(run.config):
                artifact = run.artifact(stage.name, index)
                if artifact and is_kept(artifact):
                    yield str(JobName(stage.kind, index)), artifact


def _measured(run: Run, models: dict[str, Artifact], tests: Tests) -> tuple[Row, Row]:
    config, device = run.config, default_device()
    held_out = held_out_speech(config, run.corpus)
    rows: dict[str, Row] = {}
    listings: Row = {}
    gates: Row = {}
    for name, artifact in models.items():
        is_expert = JobName.parse(name).stage == "expert"
        model: Any = run.backbone.expert(artifact) if is_expert else load_speech(artifact.local_folder())
        with measuring(config.training, device):
            row, listings[name], usage = measured_row(model, held_out, tests, device)
            if usage:
                gates[name] = gates_of(model, held_out, usage)
        rows[name] = row | _costs(models, name)
        logger.info("%s: word error rate %.3f, mean test loss %.4f", name, rows[name]["wer"], rows[name]["mean_loss"])
        del model  # before the next is loaded: two may not fit
    experts = {name: row for name, row in rows.items() if JobName.parse(name).stage == "expert"}
    if experts:
        rows["oracle"] = oracle_row(experts) | costs([models["backbone"], *map(models.__getitem__, experts)])
    last = [name for name in ("assembled", "calibrated") if name in rows]
    chosen = last[-1] if last else None
    found = {
        "name": config.name,
        "task": config.task,
        "domains": list(held_out.domains),
        "models": {name: rows[name] for name in [*(name for name in rows if name not in last), *last]},
        "chosen": chosen,
        "errors": _worst(listings[chosen or "backbone"]),
        "gates": gates,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    routing = {name: _routing(gates[name], _experts_in(run, models[name])) for name in last if name in gates}
    calibration = run.find(run.url("calibrate"))
    facts = calibration.manifest.facts if calibration else {}
    told = {key: facts[key] for key in ("kept", "loss_before", "loss_after") if key in facts}
    empty: Row = {"samples": {}, "differences": {}, "calibration": told if len(told) > 1 else None}
    return {**found, "routing": {name: row for name, row in routing.items() if row}, **empty}, listings


def _costs(models: Mapping[str, Artifact], name: str) -> Row:
    """What went into a model: its own job's, those of the experts that it is made of, and the projector's."""
    stacked = models["assembled" if name == "calibrated" else name].manifest.inputs
    made_of = [models[other] for other in stacked if JobName.parse(other).stage == "expert"]
    own = [models[name]] if name not in ("backbone", "assembled") else []
    return costs([models["backbone"], *own, *made_of])


def _experts_in(run: Run, assembled: Artifact) -> list[str]:
    names = [str(JobName("expert", index)) for index in range(run.config.experts.count)]
    found = run.require("assemble").manifest.inputs if assembled.manifest.kind != "assembled" else {}
    return [name for name in names if name in {**found, **assembled.manifest.inputs}]


def measured_row(
    model: Any, held_out: HeldOutSpeech, tests: Tests, device: torch.device
) -> tuple[Row, Row, dict[str, Any]]:
    """What one model got right, its worst utterances, and what its gates did on the domains."""
    usage: dict[str, GateReader] = {}
    measured = measure(model, held_out, device, usage)
    domains = {label: row for label, (row, _) in measured.items()}
    learned = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith(FROZEN_NAMES))
    sizes = {"parameters": learned, "active_parameters": learned, "training_tokens": None}
    worst, rows = listing(measured, held_out.listed), {}
    for name, test in tests.items():
        found = measure(model, test, device)
        rows[name] = {**found[name][0], "utterances": len(found[name][1])}
        worst |= listing(found, held_out.listed)
    return {**_means(domains), **sizes, **({"tests": rows} if rows else {})}, worst, usage


def _worst(listings: Row) -> list[Row]:
    """The worst utterances of one model, with the domains they are of."""
    return [{"domain": label, **one} for label, found in listings.items() for one in found]


def _routing(gates: Row, experts: list[str]) -> Row:
    """How much each expert weighs, by domain and by site; nothing for a model of one expert."""
    if gates["experts"] < 2:
        return {}

    def of_experts(shares_E: list[float]) -> list[float]:
        width = gates["vectors"]
        return [sum(shares_E[start : start + width]) for start in range(0, len(shares_E), width)]

    by_domain = {label: of_experts(shares) for label, shares in gates["share_per_domain_and_vector"].items()}
    return {
        "share_per_layer_and_expert": [of_experts(shares) for shares in gates["share_per_layer_and_vector"]],
        "share_per_domain_and_expert": by_domain,
        "weight_per_domain_and_expert": by_domain,
        "balance_per_layer": gates["evenness_per_layer"],
        "experts": experts,
    }


def _means(domains: dict[str, Row]) -> Row:
    """Means over the domains, which weigh alike."""
    means = {name: sum(row[name] for row in domains.values()) / len(domains) for name in RATES}
    loss, bits = (sum(row[name] for row in domains.values()) / len(domains) for name in ("loss", "bits_per_byte"))
    shared = {"mean_loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits, "positions": {}, "probes": {}}
    return {**shared, **means, "domains": domains}


def oracle_row(experts: dict[str, Row]) -> Row:
    """The best expert of each domain by its errors on the test utterances themselves: a bound, no model."""
    labels = next(iter(experts.values()))["domains"]
    best = {label: min((row["domains"][label] for row in experts.values()), key=_standing) for label in labels}
    return {**_means(best), "parameters": None, "active_parameters": None, "training_tokens": None}


def _standing(row: Row) -> tuple[float, float]:
    return float(row["wer"]), float(row["loss"])
