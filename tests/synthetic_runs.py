"""Runs written by hand: metrics, manifests and an evaluation whose every number is known."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from checkpoints import paths, write_artifact
from tests.conftest import tiny_config

START = time.time() - 600.0
STEP_SECONDS = 0.05
TOKENS_PER_STEP = 256


def write_metrics(url: str, job: str, losses: Mapping[int, float], validation: Mapping[int, float] = {}) -> None:
    """A metrics file with one line per step of `losses`, and lines of validation between them."""
    lines = [(step, training_line(job, step, loss)) for step, loss in losses.items()]
    lines += [(step, validation_line(job, step, loss)) for step, loss in validation.items()]
    content = "".join(json.dumps(line) + "\n" for _, line in sorted(lines, key=lambda item: item[0]))
    paths.replace_bytes(paths.join(url, "metrics", f"{job}.jsonl"), content.encode())


def training_line(job: str, step: int, loss: float, **changes: Any) -> dict[str, Any]:
    line = {
        "job": job,
        "time": START + step * STEP_SECONDS,
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": loss,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0 + 1 / step,
        "tokens_per_second": TOKENS_PER_STEP / STEP_SECONDS,
        "data_wait_share": 0.01,
        "peak_memory_bytes": 2**30,
    }
    return {**line, **changes}


def validation_line(job: str, step: int, loss: float) -> dict[str, Any]:
    time = START + step * STEP_SECONDS
    return {"job": job, "time": time, "step": step, "validation_loss": loss, "validation_perplexity": math.exp(loss)}


def falling(
    steps: Iterable[int], start: float = 6.0, end: float = 3.0, noise: float = 0.0, seed: int = 0
) -> dict[int, float]:
    """Losses that fall exponentially from start to end."""
    steps = list(steps)
    random = np.random.default_rng(seed)
    scale = steps[-1] / 4
    return {step: end + (start - end) * math.exp(-step / scale) + noise * float(random.normal()) for step in steps}


def write_stage(url: str, folder: str, kind: str, config: Any, files: Mapping[str, Any] = {}, **facts: Any) -> None:
    """A committed artifact with JSON files."""
    made = {"config": config.model_dump(mode="json"), "versions": {"torch": "2.0"}, "commit": "abcdef1234567890"}
    with write_artifact(paths.join(url, folder), kind, "f" * 32) as writer:
        for name, content in {"empty.json": {}, **files}.items():
            writer.write_json(name, content)
        writer.commit({**facts, "provenance": {**made, "uncommitted_sha256": None}})


def write_run(url: str, num_experts: int = 3, steps: int = 100, every: int = 5, seed: int = 0, **changes: Any) -> Any:
    """A finished run of one backbone, experts, dense baseline and calibration; returns its config."""
    phase = {"steps": steps, "batch_size": 4}
    experts = {**phase, "count": num_experts}
    config = tiny_config(url, **{"backbone": phase, "experts": experts, "seed": seed, "name": "synthetic", **changes})
    write_stage(url, "data", "corpus", config)
    write_stage(url, "data/partitions", "partitions", config)
    marks = range(every, steps + 1, every)
    jobs = ["backbone", *(f"expert-{index}" for index in range(num_experts)), "dense"]
    for number, job in enumerate(jobs):
        times = num_experts if job == "dense" else 1
        losses = falling(
            [times * mark for mark in marks],
            6.0 - 0.1 * (number > 0),
            3.0 - 0.5 * number / len(jobs),
            0.02,
            seed + number,
        )
        checked = {step: loss + 0.05 for step, loss in losses.items() if step % (4 * every * times) == 0}
        write_metrics(url, job, losses, checked)
    write_metrics(url, "calibration", {5: 3.1}, {5: 3.0})
    write_stage(url, "backbone", "backbone", config)
    for index in range(num_experts):
        write_stage(url, f"experts/expert-{index}", "expert", config, index=index)
    write_stage(url, "baselines/dense", "dense", config)
    write_stage(url, "assembled", "assembled", config)
    write_stage(url, "calibrated", "calibrated", config, kept=True)
    write_stage(url, "evaluation", "evaluation", config, {"results.json": evaluation(num_experts)}, chosen="calibrated")
    return config


def evaluation(
    num_experts: int, layers: int = 2, domains: Iterable[str] = ("law", "c_code", "<novels>")
) -> dict[str, Any]:
    """results.json as the evaluation writes it."""
    domains = list(domains)
    experts = [f"expert-{index}" for index in range(num_experts)]
    names = ["backbone", "dense", *experts, "assembled", "calibrated"]
    models = {name: model_result(3.0 - place / len(names), domains) for place, name in enumerate(names)}
    for place, model in enumerate(models.values()):
        model["positions"] = {"0-15": 3.5, "16-31": 3.0 - place / 9}
        model["probes"] = {
            name: probe_result(3.2 + place / 9, domains) for name in ("switch", "mixed", "general", "chat")
        }
    shares = np.random.default_rng(0).dirichlet(np.ones(num_experts + 1), layers + len(domains))
    routing = {
        "share_per_layer_and_expert": shares[:layers].tolist(),
        "balance_per_layer": [0.9] * layers,
        "share_per_domain_and_expert": {label: shares[layers + i].tolist() for i, label in enumerate(domains)},
        "weight_per_domain_and_expert": {label: shares[layers + i].tolist() for i, label in enumerate(domains)},
        "experts": ["public", *experts],
    }
    sample = {"prompt": "The ", "greedy": "<b>cat & dog", "sampled": "sat"}
    return {
        "name": "synthetic",
        "domains": domains,
        "models": models,
        "routing": {"assembled": routing, "calibrated": routing},
        "samples": {"calibrated": [sample]},
        "differences": {
            other: {probe: difference_result(domains) for probe in ("text", "switch", "mixed")}
            for other in ("backbone", "dense")
        },
        "chat": {
            "questions": [{"prompt": "What is <b>two</b> and two?", "answer": "Four."}],
            "replies": {"backbone": ["4"], "calibrated": ["Fo|ur"]},
        },
        "chosen": "calibrated",
        "calibration": {"kept": True, "loss_before": 3.1, "loss_after": 3.0},
        "seconds": 12.5,
        "peak_memory_bytes": 2**30,
    }


def probe_result(loss: float, domains: list[str]) -> dict[str, Any]:
    each = {label: {"loss": loss, "tokens": 50} for label in domains}
    return {"mean_loss": loss, "positions": {"0-15": loss, "16-31": loss - 0.1}, "domains": each}


def difference_result(domains: list[str]) -> dict[str, Any]:
    one = {"difference": 0.2, "standard_error": 0.05, "documents": 9, "is_clear": True}
    return {**one, "domains": {label: {**one, "standard_error": None, "is_clear": False} for label in domains}}


def model_result(loss: float, domains: list[str]) -> dict[str, Any]:
    one = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss, "tokens": 100, "bytes": 300}
    sizes = {"parameters": 1000, "active_parameters": 900, "flops_per_token": 1800, "training_tokens": 5000}
    means = {"mean_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss}
    return {**means, "domains": {label: dict(one) for label in domains}, **sizes}
