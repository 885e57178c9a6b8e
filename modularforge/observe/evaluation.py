"""The evaluation for people: its models as a table on a terminal, on the report's page and in Markdown, and a verdict.

A column is one entry in `model_table`; a metric of the evaluation is one in `modularforge/observe/metrics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from checkpoints.markdown import plain
from checkpoints.screen import say
from modularforge.observe.findings import (
    DECIDING,
    REFERENCES,
    SPEECH_REFERENCES,
    chat_table,
    doubts,
    error_table,
    finding_tables,
    harness_tables,
    likely_reason,
    routing_lines,
    task_tables,
    test_tables,
)
from modularforge.observe.metrics import Metric, decisive, is_speech, measured, of_domains, standing
from modularforge.observe.table import Column, Table, count, decimals, fixed, listing, name_column, named

Results = dict[str, Any]


def model_table(results: Results) -> Table:
    """One model a record: sizes, each domain in perplexity or error rate, and metrics that are means over domains."""
    main = of_domains(results)
    columns = [
        name_column("model"),
        Column("total", named("parameters"), count, on_screen=False),
        Column("active", named("active_parameters"), count),
        Column("training tokens", named("training_tokens"), count, on_screen=False),
        *(Column(label, _of_domain(label, main.column), main.written) for label in results["domains"]),
        *(Column(_title(one), named(one.column), one.written, on_screen=one.in_table) for one in measured(results)),
    ]
    title = f"{results['name']}: test {_title(main)}, lower is better"
    return Table(columns, [*results["models"].items()], title)


def _title(metric: Metric) -> str:
    return f"{metric.title} %" if metric.unit == "%" else metric.title


def byte_table(results: Results) -> Table:
    """Bits per byte of each domain and in the mean."""
    labels = results["domains"]
    columns = [
        name_column("model"),
        *(Column(label, _of_domain(label, "bits_per_byte"), decimals(3)) for label in labels),
    ]
    return Table([*columns, Column("mean", named("bits_per_byte"), fixed)], [*results["models"].items()])


def _of_domain(label: str, key: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: record[1]["domains"][label][key]


def print_table(results: Results) -> None:
    """The table without the columns that 80 columns have no room for, its best model marked, and the verdict."""
    models = [(standing(row, decisive(results)), name) for name, row in results["models"].items()]
    best = min(((value, place) for place, (value, name) in enumerate(models) if name != "oracle"), default=None)
    model_table(results).show(best[1] if best else None)
    for table in [*harness_tables(results), *test_tables(results)]:
        table.show()
    say(verdict(results))


def print_harness(results: Results) -> None:
    """The tables of lm-eval's tasks."""
    for table in harness_tables(results):
        table.show()


def print_errors(results: Results) -> None:
    """The worst utterances, where there are some."""
    if results.get("errors"):
        error_table(results).show()


def markdown(results: Results) -> str:
    """The whole report."""
    lines = [
        f"# {plain(results['name'])}",
        "",
        plain(verdict(results)),
        "",
        f"{_sentence(_title(of_domains(results)))} per domain on the test split; lower is better. Domains weigh alike "
        "in the means.",
        "`oracle` takes the best expert of each domain, chosen on the test split itself: a bound, no model.",
        "",
        *model_table(results).markdown(),
        *routing_lines(results["models"]),
        *_carried_lines(results),
        *([] if is_speech(results) else _byte_lines(results)),
    ]
    chat = chat_table(results)
    others = [*task_tables(results), *harness_tables(results), *([chat] if chat.records else [])]
    for found in [*finding_tables(results), *others]:
        lines += ["", f"## {plain(found.title)}", "", plain(found.words), "", *found.markdown()]
    for name, routing in results["routing"].items():
        lines += ["", f"## Where {plain(name)} routes", *_routing_lines(routing)]
    lines += ["", *([] if is_speech(results) else ["## Samples", ""])]
    for one in samples_of(results):
        lines += [f"**{plain(one['model'])}**, {one['kind']}: {plain(one['prompt'])}▸{plain(one['text'])}", ""]
    facts = f"Measured in {results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB."
    return "\n".join([*lines, facts, ""])


def _byte_lines(results: Results) -> list[str]:
    return ["", "Bits per byte of text, which compare across tokenizers:", "", *byte_table(results).markdown()]


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def samples_of(results: Results) -> Iterator[dict[str, str]]:
    """Every continuation of a prompt, with its model and how it was made."""
    for model, samples in results.get("samples", {}).items():
        for sample in samples:
            for kind in ("greedy", "sampled"):
                yield {"model": model, "kind": kind, "prompt": sample["prompt"], "text": sample[kind]}


def _routing_lines(routing: dict[str, Any]) -> list[str]:
    """Where one model's tokens go: by domain, by layer, and how evenly."""
    by_domain, by_layer = routing["share_per_domain_and_expert"], routing["share_per_layer_and_expert"]
    experts = routing.get("experts") or [str(index) for index in range(len(by_layer[0]))]
    balance = ", ".join(fixed(value, 3) for value in routing["balance_per_layer"])
    layers = {str(layer): shares for layer, shares in enumerate(by_layer)}
    lines = ["", "Share of expert visits by domain (mean over layers).", ""]
    lines += _share_table("domain", experts, by_domain).markdown()
    lines += ["", "Share by layer (mean over domains).", "", *_share_table("layer", experts, layers).markdown()]
    return [*lines, "", f"Balance per layer (1 is even, 0 is one expert only): {balance}."]


def _share_table(first: str, experts: list[str], shares: dict[str, list[float]]) -> Table:
    return listing([first, *experts], [[name, *(fixed(value, 2) for value in row)] for name, row in shares.items()])


def _carried_lines(results: Results) -> list[str]:
    """What models lose that read a document's windows one after another, where they carry something over."""
    found = [
        f"{plain(name)} {fixed(model['carried_loss'])}"
        for name, model in results["models"].items()
        if model.get("carried_loss") is not None
    ]
    words = (
        "Every window above is read as if nothing came before it. Mean loss where routing goes on over the windows of "
        "a document, as it does in generation"
    )
    return ["", f"{words}: {', '.join(found)}."] if found else []


def verdict(results: Results) -> str:
    """Whether it was worth it, and by how much: the best model of `DECIDING` is what decides."""
    models, chosen = results["models"], results["chosen"]
    if chosen is None:
        return "No assembled model was measured."
    if is_speech(results):
        return speech_verdict(results)
    loss = float(models[chosen]["mean_loss"])
    found = f"the {chosen} model has a mean test loss of {loss:.4f}"
    beside = {name: float(models[name]["mean_loss"]) for name in (*DECIDING, "backbone") if name in models}
    others = [_beside(loss, f"{REFERENCES[name]} has", other) for name, other in beside.items()]
    deciding = [other for name, other in beside.items() if name in DECIDING]
    is_bad = bool(deciding) and not loss < min(deciding)  # nor where it is not a number
    but = [f"{'Moreover,' if is_bad else 'But'} {'; '.join(sentences)}."] if (sentences := doubts(results)) else []
    if not deciding:
        return " ".join(["; ".join([_sentence(found), *others]) + ".", *but])
    start = "Not worth it here" if is_bad else "Worth it"
    why = [reason] if is_bad and (reason := likely_reason(results, min(deciding))) else []
    return " ".join([f"{start}: " + "; ".join([found, *others]) + ".", *why, *but])


def _beside(loss: float, words: str, other: float) -> str:
    """How a loss stands to another one, as a difference in perplexity where both are finite."""
    if not math.isfinite(loss - other):
        return f"{words} {other:.4f}"
    percent = 100 * (math.exp(min(700.0, loss - other)) - 1)
    return f"{words} {other:.4f}, so our perplexity is {abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}"


def speech_verdict(results: Results) -> str:
    """The same in error rates: it was worth it where no baseline has a lower one, and some have a higher one."""
    models, chosen, metric = results["models"], results["chosen"], decisive(results)
    rate = float(models[chosen][metric.column])
    found = f"the {chosen} model has a mean test {metric.title} of {metric.written(rate)} %"
    beside = {name: float(models[name][metric.column]) for name in SPEECH_REFERENCES if name in models}
    others = [
        f"{SPEECH_REFERENCES[name]} {metric.written(other)} % ({_points(metric.factor * (rate - other))})"
        for name, other in beside.items()
    ]
    deciding = [other for name, other in beside.items() if name != "backbone"]
    if not deciding:
        return "; ".join([_sentence(found), *others]) + "."
    start = "Worth it" if rate <= min(deciding) and rate < max(deciding) else "Not worth it here"
    return f"{start}: {'; '.join([found, *others])}."


def _points(difference: float) -> str:
    """How our rate stands to another one."""
    if not math.isfinite(difference) or abs(difference) < 0.05:
        return "the same" if abs(difference) < 0.05 else "beyond comparison"
    return f"ours is {abs(difference):.1f} points {'lower' if difference < 0 else 'higher'}"
