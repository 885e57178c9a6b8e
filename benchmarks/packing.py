"""What `data.packing` does to a backbone: its loss, read either way, and the speed of its training.

    python -m benchmarks.packing configs/domains.yaml [--set backbone.steps=1000 ...]

Two backbones of the same settings and seed, one on windows of the stream and one on whole documents, both on the same
prepared data and with as many steps of the same batch. Both are measured on the test split read either way: in bits per
byte, since windows predict the first token of a document too, which has no bytes. Speeds are the median of the lines
of metrics, in trained tokens, without padding. One seed: differences of a few thousandths of a bit are chance.
"""

from __future__ import annotations

import argparse
import json
import statistics

from checkpoints import paths
from modularforge.config import Config
from modularforge.config_files import load_config
from modularforge.evaluation.scoring import measure
from modularforge.model.folder import load_model
from modularforge.pipeline import metrics_url
from modularforge.run import Run
from modularforge.stage_outputs import Corpus

PACKINGS = ("stream", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="a settings file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that outrank the file's")
    options = parser.parse_args()
    print("| `data.packing` | bits per byte, in windows | document by document | tokens/s | filled | documents cut |")
    print("|---|---|---|---|---|---|")
    for packing in PACKINGS:
        print(f"| `{packing}` | {' | '.join(row(load_config(options.settings, options.set), packing))} |", flush=True)


def row(base: Config, packing: str) -> list[str]:
    data = base.data.model_copy(update={"packing": packing})
    root = paths.join(base.output_dir, "packing")
    places = {"output_dir": paths.join(root, packing), "data_dir": paths.join(root, "data")}
    config = base.model_copy(update={"data": data, **places})
    run = Run(config)
    for stage in ("prepare-data", "backbone"):
        run.make(stage)
    backbone = run.require("backbone")
    model, corpus = load_model(backbone.local_folder()), run.require("prepare-data")
    limits = config.evaluation.batch_size, config.evaluation.tokens_per_domain, config.model.context_length
    losses = []
    for apart in (False, True):
        streams = Corpus(corpus, apart).domains("test", config.evaluation.tokens_per_domain)
        losses.append(f"{measure(model, streams, run.corpus.byte_lengths, *limits).mean_bits_per_byte:.4f}")
    facts = backbone.manifest.facts.get("documents")
    cut = [f"{100 * facts['filled']:.1f} %", f"{facts['cut']} of {facts['count']}"] if facts else ["100 %", "–"]
    return [*losses, f"{speed(config):,.0f}", *cut]


def speed(config: Config) -> float:
    lines = map(json.loads, paths.read_bytes(metrics_url(config, "backbone")).splitlines())
    return statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)


if __name__ == "__main__":
    main()
