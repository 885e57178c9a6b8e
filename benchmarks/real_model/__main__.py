"""ModularForge on SmolLM2-135M-Instruct: convert it, train four experts and the baselines, assemble, measure.

    OMP_NUM_THREADS=1 python -m benchmarks.real_model --texts TEXTS --cache CACHE --output OUTPUT

What is finished is not done again. Only one training runs at a time.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.real_model import smollm2
from benchmarks.real_model.measure import Measurements, assembled
from benchmarks.real_model.report import write_report
from benchmarks.real_model.settings import ADAPTER_EXPERTS, TRIALS, Scale, Trial, run_config
from benchmarks.real_model.train import Trainings
from modularforge.config import Config
from modularforge.model.folder import load_model
from modularforge.run import Run
from modularforge.stage_outputs import Backbone

BASELINES = ("dense", "lora", "lora_wide")
VARIANTS: dict[str, dict[str, Any]] = {
    "assembled": {},
    "assembled top-1": {"experts_per_token": 1},
    "assembled without public": {"public_expert": False},
    "assembled for other programs": {"token_pairs": 0},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora assembled": {},
    "lora assembled top-1": {"experts_per_token": 1},
    "lora assembled, a sequence at a time": {"lora_choice": "sequence"},
    "lora average": {"lora": "average"},
}
TINY = Scale(2, 2, 1024, 512, 1024, {kind: [Trial(3e-4), Trial(1e-3)][: len(TRIALS[kind])] for kind in TRIALS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder with a folder for each domain")
    parser.add_argument("--cache", type=Path, required=True, help="where the model is downloaded and converted to")
    parser.add_argument("--output", type=Path, required=True, help="where everything is written")
    parser.add_argument("--tiny", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--precision", default="bf16", help="of training; bf16 is slow on CPUs without avx512_bf16")
    parser.add_argument(
        "--only", nargs="*", default=["experts", "lora_experts", *BASELINES, "measure"], help="some parts alone"
    )
    parser.add_argument("--split", choices=["validation", "test"], default="validation", help="what is measured on")
    options = parser.parse_args()
    scale = TINY if options.tiny else Scale()
    model = smollm2.obtain(options.cache)
    settings: Any = partial(run_config, model, options.texts, options.output, scale, options.precision)
    run = Run(settings())
    for stage in ("prepare-data", "partition", "backbone"):
        run.make(stage)
    trainings = Trainings(settings, scale, options.output)
    rate = trainings.best("experts").rate
    config = settings(rate=rate)
    for index in range(config.experts.count):
        Run(config).make("expert", index)
    if "lora_experts" in options.only:
        adapters = adapter_run(settings, trainings.best("lora_experts").rate, options.output)
    for kind in BASELINES:
        if kind in options.only:
            trainings.baseline(kind)
    if "measure" in options.only:
        places = options.texts, options.output, options.split
        measurements = Measurements(config, trainings.corpus, *places, scale)
        measure(config, measurements, options.output)
        if "lora_experts" in options.only:
            measure_experts(adapters, measurements, ADAPTERS, "lora expert-")
        report = write_report(measurements.rows(), trainings.notes(), options.split, options.output)
        print(report.read_text())


def measure(config: Config, measurements: Measurements, output: Path) -> None:
    """Measure backbone, baselines, experts and the assembled variants, those that are there."""
    folders = {
        "backbone": Run(config).require("backbone").local_folder(),
        **{kind: output / kind for kind in BASELINES},
    }
    for name, folder in folders.items():
        if (folder / "config.json").is_file():
            measurements.row(name, partial(load_model, folder))
    measure_experts(config, measurements, VARIANTS, "expert-")


def adapter_run(settings: Any, rate: float, output: Path) -> Config:
    """Train adapters as experts, in a run of their own on the same data; its settings."""
    config: Config = settings(rate=rate, experts=ADAPTER_EXPERTS)
    config = config.model_copy(
        update={"output_dir": str(output / "run-lora"), "data_dir": str(output / "run" / "data")}
    )
    run = Run(config)
    for stage in ("prepare-data", "partition", "backbone"):
        run.make(stage)
    for index in range(config.experts.count):
        run.make("expert", index)
    return config


def measure_experts(
    config: Config, measurements: Measurements, variants: dict[str, dict[str, Any]], prefix: str
) -> None:
    """Measure a run's experts, assembled in these ways and each alone."""
    run = Run(config)
    parts = run.require("backbone"), run.require_each("expert")
    for name, assembly in variants.items():
        measurements.row(name, partial(assembled, config, *parts, assembly))
    for index, artifact in enumerate(parts[1]):
        measurements.row(f"{prefix}{index}", partial(Backbone(parts[0]).expert, artifact), ["text", "general"])


if __name__ == "__main__":
    main()
