"""Run a study: train what is missing, measure each variant once, and write the table anew after each one.

A result is an artifact with the fingerprint of all that it was made from: the same command continues after a stop, and
a variant whose settings or models changed is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from checkpoints import Artifact, find_artifact, paths
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.evaluation.bench import training_tokens
from modularforge.evaluation.extras import read_texts, texts_identity
from modularforge.evaluation.replies import tasks_identity
from modularforge.log import json_safe, logger
from modularforge.observe.metrics import DECISIVE, standing
from modularforge.observe.study import write_table
from modularforge.pipeline import Plan, contents, stage_settings
from modularforge.provenance import making, provenance
from modularforge.study.measure import RunBench, Split, needed_artifacts
from modularforge.study.runs import Runs
from modularforge.study.speech import SpeechBench
from modularforge.study.study_file import ROUTED, Variant, reference_of, variants_of
from modularforge.study.table import make_table

AnyBench = RunBench | SpeechBench
RESULT_NAME = "result.json"
# Raised when results say more or other things than before, so that variants are measured again.
RESULT_FORMAT = 3


def run_study(runs: Runs, split: Split, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> str:
    """Measure the chosen variants (all by default) with the chosen seeds; returns the URL of the table."""
    variants = choose_variants(runs, split, only)
    texts = read_texts(runs.study.texts.get(split, []))
    for seed in choose_seeds(runs, seeds):
        benches: dict[str, AnyBench] = {}
        for variant in (variant for variant in variants if seed in variant.seeds):
            if variant.recipe not in benches:
                run = runs.run(seed, variant.recipe)
                kind = SpeechBench if run.config.task == "speech" else RunBench
                benches[variant.recipe] = kind(run, split, _limit(runs, run.config, split), texts)
            result, is_new = measure_once(runs, benches[variant.recipe], variant, seed)
            best = min(result["rows"].values(), key=standing)[DECISIVE.column]
            logger.info("seed %d, %s: %s on %s %.4f", seed, variant.name, DECISIVE.title, split, best)
            if is_new:
                draw(runs, split, with_plot=False)
        draw(runs, split)
    return draw(runs, split)


def draw(runs: Runs, split: Split, with_plot: bool = True) -> str:
    """Write what is measured as table-SPLIT.json, .md and .png at the study's root; returns the URL of the table."""
    study = runs.study
    table = make_table(study.name, split, collect(runs, split), reference_of(study), study.compare)
    return write_table(paths.join(runs.root, f"table-{split}"), table, with_plot)


def choose_variants(runs: Runs, split: Split, only: Sequence[str]) -> list[Variant]:
    """The variants to measure: those named (or whose entry is), else all, on the test split the final ones."""
    variants = variants_of(runs.study)
    if not only:
        return [variant for variant in variants if variant.options.final or split == "validation"]
    for name in only:
        if not any(name in (variant.name, variant.entry) for variant in variants):
            known = ", ".join(runs.study.variants)
            raise ConfigError(f"--only must name a variant of the study, but there is no {name}; known: {known}")
    return [variant for variant in variants if variant.name in only or variant.entry in only]


def choose_seeds(runs: Runs, seeds: Sequence[int]) -> list[int]:
    """The chosen seeds of the study, all by default."""
    unknown = sorted(set(seeds) - set(runs.study.seeds))
    if unknown:
        raise ConfigError(
            f"--seed must be one of the study's seeds {runs.study.seeds}, but is {unknown[0]}; add it there"
        )
    return list(seeds) or runs.study.seeds


def measure_once(runs: Runs, bench: AnyBench, variant: Variant, seed: int) -> tuple[dict[str, Any], bool]:
    """The result of a variant, and whether it was measured and committed just now."""
    config = runs.config(seed, variant.recipe, variant.settings)
    parts = needed_artifacts(bench.run, variant)
    plan = result_plan(runs, bench, variant, config, parts, seed)
    old = find_artifact(plan.url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        return old.read_json(RESULT_NAME), False
    start = time.perf_counter()
    limit = _limit(runs, config, "validation")
    limited = config.evaluation.model_copy(update={"tokens_per_domain": limit})
    measured = bench.measure(variant, config.model_copy(update={"evaluation": limited}), parts)
    about = {"variant": variant.name, "kind": variant.kind, "recipe": variant.recipe, "seed": seed}
    whole = "btx_trained" if variant.kind == "btx_trained" else "experts"  # it alone trains on after its members
    tokens = [training_tokens(config, "backbone"), training_tokens(config, whole)]
    seconds = round(time.perf_counter() - start, 3)
    result: dict[str, Any] = json_safe({**about, "tokens": tokens, **measured, "seconds": seconds})
    if old:
        paths.remove(plan.url)
    with making(plan) as writer:
        writer.write_json(RESULT_NAME, result)
        writer.commit(json_safe({"mean_loss": _losses(result), "provenance": provenance(config)}))
    return result, True


def result_plan(
    runs: Runs, bench: AnyBench, variant: Variant, config: Config, parts: dict[str, Artifact], seed: int
) -> Plan:
    """Where a result lies and all that it depends on."""
    settings: dict[str, Any] = {
        "format": RESULT_FORMAT,
        "kind": variant.kind,
        "split": bench.split,
        "tokens_per_domain": bench.limit,
        "batch_size": config.evaluation.batch_size,
        "calibrate": variant.options.calibrate,
        "removal": variant.options.removal,
        "without": variant.options.without,
        **({"carry": True} if variant.options.carry else {}),
        **({"packing": config.data.packing} if config.reads_documents else {}),
        "seed": seed,
    }
    if config.task == "speech":
        settings |= {f"speech.decoding.{name}": value for name, value in config.speech.decoding}
    if variant.kind in ROUTED:
        settings |= stage_settings(config, "assemble")
    if variant.options.calibrate:
        settings |= {**stage_settings(config, "calibrate"), "decided_on": _limit(runs, config, "validation")}
    inputs = {name: artifact.manifest.fingerprint for name, artifact in parts.items()}
    inputs["corpus"] = contents(bench.run.corpus.artifact)
    if bench.split == "test":
        inputs |= tasks_identity(bench.run.config)
    if bench.texts:
        inputs["texts"] = texts_identity(bench.texts)
    return Plan("result", _result_url(runs, bench.split, variant, seed), settings, inputs)


def collect(runs: Runs, split: Split) -> dict[str, list[dict[str, Any]]]:
    """The committed results of each variant, by name in the order of the file, one for each seed that has it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in variants_of(runs.study):
        for seed in runs.study.seeds:
            artifact = find_artifact(_result_url(runs, split, variant, seed))
            if artifact and artifact.manifest.settings.get("format") == RESULT_FORMAT:
                found.setdefault(variant.name, []).append(artifact.read_json(RESULT_NAME))
    return found


def _result_url(runs: Runs, split: Split, variant: Variant, seed: int) -> str:
    return paths.join(runs.root, "results", split, f"seed-{seed}", variant.name)


def _limit(runs: Runs, config: Config, split: Split) -> int:
    limit = config.evaluation.tokens_per_domain
    return limit if split == "test" else min(limit, runs.study.validation_tokens_per_domain)


def _losses(result: dict[str, Any]) -> dict[str, float]:
    return {name: row[DECISIVE.column] for name, row in result["rows"].items()}
