"""What `data.packing` does to a backbone: its loss, read either way, and the speed of its training.

    python -m benchmarks.packing configs/domains.yaml [--set backbone.steps=1000 ...]

Two backbones of the same settings and seed, one on windows of the stream and one on whole documents, both on the same
prepared data and with as many steps of the same batch. Both are measured on the test split read either way: in bits per
byte, since windows predict the first token of a document too, which has no bytes. Speeds are trained tokens, without
padding, per second of processor time, forward and backward, both in turns. One seed: differences of a few thousandths
of a bit are chance.
"""

from __future__ import annotations

import argparse
import statistics
import time

from checkpoints import paths
from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.evaluation.scoring import measure
from modularforge.model.folder import load_model
from modularforge.run import Run
from modularforge.stage_outputs import Corpus
from modularforge.tasks.task import task_of

PACKINGS = ("stream", "documents")
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="a settings file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that outrank the file's")
    options = parser.parse_args()
    configs = {name: config_of(load_config(options.settings, options.set), name) for name in PACKINGS}
    print("| `data.packing` | bits per byte, in windows | document by document | filled | documents cut |")
    print("|---|---|---|---|---|")
    for name, config in configs.items():
        print(f"| `{name}` | {' | '.join(losses(config))} |", flush=True)
    for name, found in speeds(configs).items():
        print(f"\n{name}: {found:,.0f} tokens per second of processor time", flush=True)


def config_of(base: Config, packing: str) -> Config:
    data = base.data.model_copy(update={"packing": packing})
    root = paths.join(base.output_dir, "packing")
    places = {"output_dir": paths.join(root, packing), "data_dir": paths.join(root, "data")}
    return base.model_copy(update={"data": data, **places})


def losses(config: Config) -> list[str]:
    """What the two readings of the test split cost, and what of the training text is cut."""
    run = Run(config)
    for stage in ("prepare-data", "backbone"):
        run.make(stage)
    backbone = run.require("backbone")
    model, corpus = load_model(backbone.local_folder()), run.require("prepare-data")
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain, config.model.context_length
    found = []
    for apart in (False, True):
        streams = Corpus(corpus, apart).domains("test", config.evaluation.tokens_per_domain)
        found.append(f"{measure(model, streams, run.corpus.byte_lengths, *limits).mean_bits_per_byte:.4f}")
    facts = backbone.manifest.facts.get("documents")
    return [*found, *([f"{100 * facts['filled']:.1f} %", f"{facts['cut']} of {facts['count']}"] if facts else "––")]


def speeds(configs: dict[str, Config]) -> dict[str, float]:
    """Median over turns, so that what else runs on the machine meets both alike."""
    run = Run(configs["stream"])
    model = load_model(run.require("backbone").local_folder()).float().train()
    streams = {name: task_of(each).everything(each, Run(each).corpus).batches() for name, each in configs.items()}
    found: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(ROUNDS):
        for name, config in configs.items():
            start = time.process_time()
            batch = next(streams[name])
            task_of(config).loss(model, batch.tensors).backward()
            model.zero_grad()
            if turn:  # the first has to lay out what it reads
                found[name].append(batch.units / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
