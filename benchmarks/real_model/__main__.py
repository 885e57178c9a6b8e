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
from benchmarks.real_model.settings import Scale, Trial, run_config
from benchmarks.real_model.train import Trainings
from modularforge.stages import backbone, expert, prepare

TINY = Scale(2, 2, 1024, 512, 512, {kind: [Trial(3e-4)] for kind in ("experts", "dense", "lora")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder with a folder for each domain")
    parser.add_argument("--cache", type=Path, required=True, help="where the model is downloaded and converted to")
    parser.add_argument("--output", type=Path, required=True, help="where everything is written")
    parser.add_argument("--tiny", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--precision", default="bf16", help="of training; bf16 is slow on CPUs without avx512_bf16")
    parser.add_argument("--only", choices=["experts", "dense", "lora", "measure"], help="one part alone")
    options = parser.parse_args()
    scale = TINY if options.tiny else Scale()
    settings: Any = partial(
        run_config, smollm2.obtain(options.cache), options.texts, options.output, scale, options.precision
    )
    prepare.run(settings())
    backbone.run(settings())
    trainings = Trainings(settings, scale, options.output)
    rate = trainings.best("experts").rate
    config = settings(rate=rate)
    for index in range(config.experts.count):
        expert.run(config, index)
    for kind in ("dense", "lora"):
        if options.only in (None, kind):
            trainings.baseline(kind)


if __name__ == "__main__":
    main()
