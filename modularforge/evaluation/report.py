"""The evaluation as a table for people: Markdown for files, rich for a terminal, from the same rows."""

from __future__ import annotations

import math
from typing import Any

from checkpoints.markdown import plain
from checkpoints.markdown import table as markdown_table
from checkpoints.screen import breakable, literal, say, show, table
from modularforge.evaluation.findings import chat_rows, doubts, fixed, sections

Results = dict[str, Any]
TOTAL, TRAINING_TOKENS = 1, 3  # places of columns


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one model a row, loss in perplexity per domain, and their equal-weight mean."""
    labels = results["domains"]
    header = ["model", "total", "active", "training tokens", *labels, "mean loss", "perplexity", "bits/byte"]
    rows = []
    for name, model in results["models"].items():
        cells = [_number(model["domains"][label]["perplexity"]) for label in labels]
        size = [_count(model["parameters"]), _count(model["active_parameters"]), _count(model["training_tokens"])]
        means = [fixed(model["mean_loss"], 4), _number(model["perplexity"]), fixed(model["bits_per_byte"], 4)]
        rows.append([name, *size, *cells, *means])
    return header, rows


def markdown(results: Results) -> str:
    """The whole report."""
    lines = [
        f"# {plain(results['name'])}",
        "",
        plain(_verdict(results)),
        "",
        "Perplexity per domain on the test split; lower is better. Domains weigh alike in the means.",
        "`oracle` takes the best expert of each domain, chosen on the test split itself: a bound, no model.",
        "",
        *_markdown_table(*table_rows(results)),
        *_routing_lines(results),
        *_carried_lines(results),
        "",
        "Bits per byte of text, which compare across tokenizers:",
        "",
        *_markdown_table(*_byte_rows(results)),
    ]
    for title, words, rows in sections(results):
        lines += ["", f"## {plain(title)}", "", plain(words), "", *_markdown_table(*rows)]
    asked, replies = chat_rows(results)
    if replies:
        lines += ["", "## Replies to chat prompts", "", "The likeliest token each time.", ""]
        lines += markdown_table(list(map(plain, asked)), [list(map(plain, row)) for row in replies])
    for name, routing in results["routing"].items():
        lines += ["", f"## Where {plain(name)} routes", "", "Share of expert visits by domain (mean over layers).", ""]
        lines += _markdown_table(*_routing_rows(routing))
        lines += ["", "Share by layer (mean over domains).", ""]
        lines += _markdown_table(*_layer_rows(routing))
        balance = ", ".join(fixed(value, 3) for value in routing["balance_per_layer"])
        lines += ["", f"Balance per layer (1 is even, 0 is one expert only): {balance}."]
    lines += ["", "## Samples", ""]
    for name, samples in results["samples"].items():
        for sample in samples:
            for kind in ("greedy", "sampled"):
                lines += [f"**{plain(name)}**, {kind}: {plain(sample['prompt'])}▸{plain(sample[kind])}", ""]
    facts = f"Measured in {results['seconds']:.0f} s, peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB."
    return "\n".join([*lines, facts, ""])


def _verdict(results: Results) -> str:
    """Whether it was worth it, and by how much: the compute-matched dense model is what decides."""
    models, chosen = results["models"], results["chosen"]
    if chosen is None:
        return "No assembled model was measured."
    loss = float(models[chosen]["mean_loss"])
    found = f"the {chosen} model has a mean test loss of {loss:.4f}"
    words = {"dense": "a dense model trained on the same tokens has", "backbone": "the backbone has"}
    others = [_beside(loss, words[name], float(models[name]["mean_loss"])) for name in words if name in models]
    but = [f"But {'; '.join(sentences)}."] if (sentences := doubts(results)) else []
    if "dense" not in models:
        return " ".join(["; ".join([found[0].upper() + found[1:], *others]) + ".", *but])
    start = "Worth it" if loss < float(models["dense"]["mean_loss"]) else "Not worth it here"
    return " ".join([f"{start}: " + "; ".join([found, *others]) + ".", *but])


def _beside(loss: float, words: str, other: float) -> str:
    """How a loss stands to another one, as a difference in perplexity where both are finite."""
    if not math.isfinite(loss - other):
        return f"{words} {other:.4f}"
    percent = 100 * (math.exp(min(700.0, loss - other)) - 1)
    return f"{words} {other:.4f}, so our perplexity is {abs(percent):.1f} % {'lower' if percent < 0 else 'higher'}"


def _routing_rows(routing: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    shares = routing["share_per_domain_and_expert"]
    experts = len(next(iter(shares.values())))
    names = routing.get("experts") or [str(index) for index in range(experts)]
    return ["domain", *names], [[label, *(fixed(value, 2) for value in row)] for label, row in shares.items()]


def _layer_rows(routing: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    shares = routing["share_per_layer_and_expert"]
    names = routing.get("experts") or [str(index) for index in range(len(shares[0]))]
    return ["layer", *names], [[str(layer), *(fixed(value, 2) for value in row)] for layer, row in enumerate(shares)]


def _carried_lines(results: Results) -> list[str]:
    """What models lose that read a document's windows one after another, where they carry something over."""
    found = [
        f"{plain(name)} {fixed(model['carried_loss'], 4)}"
        for name, model in results["models"].items()
        if model.get("carried_loss") is not None
    ]
    lead = (
        "Every window above is read as if nothing came before it. Mean loss where routing goes on over the windows of a"
    )
    return ["", f"{lead} document, as it does in generation: {', '.join(found)}."] if found else []


def _routing_lines(results: Results) -> list[str]:
    """What of the active parameters carries nothing but routing: rows, and channels of the evidence router."""
    found = [
        f"{plain(name)} {_count(model['routing_parameters'])}"
        for name, model in results["models"].items()
        if model.get("routing_parameters")
    ]
    return ["", f"Of the active parameters, these carry nothing but routing: {', '.join(found)}."] if found else []


def _byte_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    labels, rows = results["domains"], []
    for name, model in results["models"].items():
        cells = [fixed(model["domains"][label]["bits_per_byte"], 3) for label in labels]
        rows.append([name, *cells, fixed(model["bits_per_byte"], 4)])
    return ["model", *labels, "mean"], rows


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_table(list(map(plain, header)), [list(map(plain, row)) for row in rows], numbers_from=1)


def print_table(results: Results) -> None:
    """The table without the counts, which fits 80 columns for five domains, and the verdict."""
    header, rows = table_rows(results)
    # By place, because a domain may be called `total` too.
    shown = [index for index in range(len(header)) if index not in (TOTAL, TRAINING_TOKENS, len(header) - 1)]
    best = min(
        (place for place, row in enumerate(rows) if row[0] != "oracle"), key=lambda place: float(rows[place][-3])
    )
    made = table(
        [breakable(literal(header[index], keep=""), "\n") for index in shown],
        [[row[index] for index in shown] for row in rows],
        title=f"{results['name']}: test perplexity, lower is better",
        numbers_from=1,
        marked=best,
        pad_edge=False,
        box=None,
    )
    show(made)
    say(_verdict(results))


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _count(value: int | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)
