"""Small runs of the shipped configurations as they were once computed: fingerprints, file hashes and losses.

    python -m tests.golden            compare with what is recorded
    python -m tests.golden --accept   record what is computed now: say in CHANGELOG.md what changed and why

Fingerprints hold on every machine. Trained weights are compared bit for bit only where processor and torch are those of
the record, since another one may add in another order.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from checkpoints import find_artifact, paths
from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.pipeline import metrics_url
from modularforge.run import Run
from tests.conftest import ROOT, run_every_stage, tiny_config

FILE = ROOT / "tests/golden/runs.json"
SHIPPED = ("quickstart", "default", "small", "domains", "cluster", "cluster-cpu")
BASELINES = ["dense", "dense_wide", "soup", "joint", "joint_evidence", "btx"]
ANCHORED = "anchored, learned router, all baselines"
FIFTY_STEPS = "fifty steps of a backbone"
NAMES = (*SHIPPED, ANCHORED, FIFTY_STEPS)
MODEL_CARD = "README.md"  # names the versions of packages
TOLERANCE = 1e-3  # of a loss on another processor


def config_of(name: str, folder: Path) -> Config:
    """The settings of one run, at the size of a smoke test."""
    if name == FIFTY_STEPS:
        return tiny_config(folder / "run", backbone={"steps": 50})
    if name == ANCHORED:
        return tiny_config(folder / "run", evaluation={"baselines": BASELINES})
    config = load_config(str(ROOT / f"configs/{name}.yaml"), ["experts.count=5"], smoke_test=True)
    return config.model_copy(update={"output_dir": str(folder / "run")})


def computed(name: str) -> dict[str, Any]:
    """What a run leaves: by folder the fingerprint, and the hashes of all files but those with times or versions."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, Path(folder))
        if name == FIFTY_STEPS:
            return {"artifacts": {}, "losses": _curve(Run(config))}
        losses = run_every_stage(config)["models"]
        found = {}
        for manifest in sorted(Path(config.output_dir).rglob("manifest.json")):
            place = manifest.parent.relative_to(config.output_dir).as_posix()
            artifact = find_artifact(paths.join(config.output_dir, place))
            if artifact is None or place.startswith("checkpoints/"):
                continue
            files = {} if place == "evaluation" else artifact.manifest.files
            found[place] = {
                "fingerprint": artifact.manifest.fingerprint,
                "files": {name: entry.digest[:16] for name, entry in sorted(files.items()) if name != MODEL_CARD},
            }
    return {"artifacts": found, "losses": {name: row["mean_loss"] for name, row in losses.items()}}


def _curve(run: Run) -> dict[str, float]:
    """Losses of a backbone by step, as its metrics have them."""
    for stage in ("prepare-data", "partition", "backbone"):
        run.make(stage)
    lines = paths.read_bytes(metrics_url(run.config, "backbone")).decode().splitlines()
    values = [json.loads(line) for line in lines]
    return {f"step {item['step']}": item["loss"] for item in values if "loss" in item}


def machine() -> dict[str, str]:
    """What the last bits of a training depend on."""
    with open("/proc/cpuinfo") as file:
        lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    capability = str(torch.backends.cpu.get_cpu_capability())
    return {"processor": (lines or [platform.processor()])[0], "torch": torch.__version__, "vector": capability}


def recorded() -> dict[str, Any]:
    """The record."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def differences(name: str, now: dict[str, Any], then: dict[str, Any], bit_for_bit: bool) -> list[str]:
    """One line for each fingerprint, file or loss that is not what was recorded."""
    found = []
    for place in sorted({*now["artifacts"], *then["artifacts"]}):
        new, old = (side["artifacts"].get(place) for side in (now, then))
        if new is None or old is None:
            found.append(f"{name}: {place} is {'missing' if new is None else 'new'}")
            continue
        if new["fingerprint"] != old["fingerprint"]:
            found.append(f"{name}: {place} has another fingerprint")
        if bit_for_bit or place.startswith("data"):
            found += [
                f"{name}: {place}/{file} differs"
                for file in {*new["files"], *old["files"]}
                if new["files"].get(file) != old["files"].get(file)
            ]
    for model in {*now["losses"], *then["losses"]}:
        new, old = (side["losses"].get(model) for side in (now, then))
        if new is None or old is None or abs(new - old) > (0.0 if bit_for_bit else TOLERANCE):
            found.append(f"{name}: the loss of {model} is {new}, was {old}")
    return found
