"""What each expert of a run learns and forgets, and how much of either is left of a part of its change.

    python -m benchmarks.forgetting RUN [--strengths 0.25 0.5 0.75 1] [--general LABEL] [--chat FILE]

An expert at strength s is the point at s on the line from the backbone to it: adapters times s, or, of trained weights,
the backbone's plus s times the difference. For each point the table has the loss of the expert's own text less the
backbone's ("own": what it learned), that of text of the label `--general` and of the other domains, and that of answers
in a chat, in nats per token, lower is better. It ends with the largest strength at which neither general text nor chat
is more than one per cent above the backbone's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modularforge.config_files import load_config, settings_of_run
from modularforge.evaluation.extras import prepare_chat, read_questions
from modularforge.evaluation.probes import CHAT, Probe, text_probe
from modularforge.evaluation.scoring import score, summarise
from modularforge.model.backbone import Decoder
from modularforge.model.lora import LoraLinear
from modularforge.run import Run
from modularforge.stage_outputs import own_domains

ALLOWED = 0.01  # of the backbone's loss
BATCH = 4


@dataclass(frozen=True)
class Bench:
    """What models are measured on: text by label, and answers in a chat."""

    probes: Mapping[str, Probe]
    byte_lengths: Tensor

    def losses(self, model: Decoder) -> dict[str, float]:
        """The mean loss of each probe, nats per token."""
        found = {}
        for name, probe in self.probes.items():
            row = summarise(probe, score(model.eval(), probe, BATCH), self.byte_lengths)
            found[name] = float(row["mean_loss"])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder or URL of a run whose experts are trained")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--general", help="label of text that is no expert's own; by default none")
    parser.add_argument("--chat", help="file of prompts and answers, as evaluation.chat has them")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--tokens", type=int, default=4096, help="of each label")
    options = parser.parse_args()
    settings = settings_of_run(options.run)
    if settings is None:
        raise SystemExit(f"{options.run} must be the folder of a run, but has no settings; name another")
    run = Run(load_config(settings, output_dir=options.run))
    bench = bench_of(run, options.split, options.tokens, options.chat)
    base = bench.losses(run.backbone.model())
    print("backbone  " + "  ".join(f"{name} {loss:.4f}" for name, loss in base.items()))
    print(f"{'expert':>8} {'strength':>8} {'own':>8} {'general':>8} {'others':>8} {'chat':>8}   (less the backbone)")
    for index, domains in enumerate(own_domains(run.require("partition"))):
        own = [name for name in domains if name != options.general]
        report(run, index, own, options.general or "", options.strengths, bench, base)


def bench_of(run: Run, split: str, tokens: int, chat: str | None) -> Bench:
    """Probes of a split of a run's corpus."""
    corpus, context = run.corpus, run.config.model.context_length
    streams = corpus.domains(split, tokens + 1)
    probes = {
        label: text_probe(label, {label: stream}, context, corpus.end_token, tokens)
        for label, stream in streams.items()
    }
    if chat:
        probes[CHAT] = prepare_chat(read_questions(chat), corpus).probe()
    return Bench(probes, corpus.byte_lengths)


def report(
    run: Run,
    index: int,
    own: list[str],
    general: str,
    strengths: list[float],
    bench: Bench,
    base: Mapping[str, float],
) -> None:
    """Print the rows of one expert, and how strong it may be."""
    kept = 0.0
    guards = [name for name in (general, CHAT) if name in base]
    for strength in sorted(strengths):
        losses = bench.losses(at_strength(run, index, strength))
        change = {name: losses[name] - base[name] for name in base}
        others = [value for name, value in change.items() if name not in (*own, general, CHAT)]
        groups = [[change[name] for name in own], [change[general]] if general in change else [], others]
        groups.append([change[CHAT]] if CHAT in change else [])
        cells = [f"{sum(group) / len(group):+8.4f}" if group else f"{'-':>8}" for group in groups]
        print(f"{index:8d} {strength:8.2f} {' '.join(cells)}", flush=True)
        if all(change[name] <= ALLOWED * base[name] for name in guards):
            kept = strength
    if guards:
        print(f"{index:8d} may have strength {kept} (target 1: {', '.join(guards)} within 1 % of the backbone)")


def at_strength(run: Run, index: int, strength: float) -> Decoder:
    """The expert at a point of the line from the backbone; of FFN and LoRA experts, not of anchored ones."""
    backbone, expert = run.backbone.tensors, run.backbone.expert(run.require("expert", index))
    with torch.no_grad():
        for module in expert.modules():
            if isinstance(module, LoraLinear):
                module.scale *= strength
        for name, weight in expert.named_parameters():
            if name in backbone and not torch.equal(weight, backbone[name]):
                weight.copy_(torch.lerp(backbone[name].float(), weight.float(), strength))
    return expert


if __name__ == "__main__":
    main()
