"""What could refute a good mean, as tables and sentences: other text, other places, other models, and how sure it is.

An evaluation and a study show the same of it: both hold rows by name, with losses under `probes` and `positions` and
with what they were held against under `differences`. Older results have less of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from checkpoints.markdown import plain
from modularforge.advice import FEW_TOKENS, USUAL_TOKENS
from modularforge.observe.run import kind_of
from modularforge.observe.table import (
    MISSING,
    Column,
    Table,
    count,
    decimals,
    fixed,
    listing,
    name_column,
    named,
    signed,
)

Results = Mapping[str, Any]
Rows = Mapping[str, Any]
# Each kind of text that models are measured on: how tables call it, and how a sentence does.
PROBES = {
    "text": "text",
    "switch": "behind a switch",
    "mixed": "mixed passages",
    "general": "no domain",
    "chat": "chat",
}
WHERE = {
    "text": "on plain text",
    "switch": "behind a switch of domain",
    "mixed": "in mixed documents",
    "general": "on text of no domain",
    "chat": "on known answers to chat prompts",
}
REFERENCES = {
    "backbone": "the backbone",
    "dense": "a dense model trained on the same tokens",
    "dense_wide": "a dense model of as many active parameters",
    "joint_lora": "one adapter trained on the same tokens",
    "joint_lora_wide": "one adapter of all experts' rank",
}
"""What sentences hold the chosen model against, and how they call it."""
SPEECH_REFERENCES = {
    "joint": "vectors trained jointly on the same utterances have",
    "dense": "the projector alone, trained on the same utterances, has",
    "backbone": "the backbone has",
}
"""The same of speech, with their verbs."""
DECIDING = tuple(name for name in REFERENCES if name != "backbone")
"""Of these the models that an assembled one has to be better than: without experts, trained on the same tokens."""
TASK_METRICS = {
    "bleu": "BLEU",
    **{f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)},
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_lsum": "ROUGE-Lsum",
    "meteor": "METEOR",
    "exact_match": "exact match",
    "accuracy": "accuracy",
}
SWITCH_WORDS = (
    "Behind a switch: the second half of windows whose first half is another domain's text. Mixed passages: documents "
    "of 16 to 96 tokens of one domain after another."
)


def probe_table(rows: Rows, first: str, title: str, words: str) -> Table:
    """Mean loss of each row on each probe, of those that were measured on more than the text."""
    known = probes_in(row.get("probes", {}) for row in rows.values())
    columns = [name_column(first), Column("text", named("mean_loss"), fixed)]
    columns += [Column(PROBES[name], _loss_on(name), fixed) for name in known]
    return Table(columns, [(name, row) for name, row in rows.items() if row.get("probes")], title, words)


def probes_in(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """The probes that any has, in the order of the tables."""
    known = {name for probes in found for name in probes}
    return [name for name in PROBES if name in known]


def _loss_on(probe: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: record[1].get("probes", {}).get(probe, {}).get("mean_loss")


def positions_of(row: Mapping[str, Any], probe: str = "text") -> Mapping[str, Any]:
    """Losses of a row by position in the window, or by distance from a switch."""
    found: Mapping[str, Any] = (row if probe == "text" else row.get("probes", {}).get(probe, {})).get("positions", {})
    return found


def position_table(
    rows: Rows, first: str, title: str, words: str, probe: str = "text", anchors: Sequence[str] = ()
) -> Table:
    """Mean loss by position; with backbone and oracle as anchors, also the share of the oracle's gain that is kept."""
    places = {name: found for name, row in rows.items() if (found := positions_of(row, probe))}
    start, best = (places.get(name, {}) for name in anchors or ("", ""))

    def cell(place: str) -> Callable[[tuple[str, Any]], Any]:
        return lambda record: _kept(record[1].get(place), start.get(place), best.get(place))

    known = dict.fromkeys(place for found in places.values() for place in found)
    return Table(
        [name_column(first), *(Column(place, cell(place)) for place in known)], [*places.items()], title, words
    )


def _kept(loss: Any, start: Any, best: Any) -> str | None:
    if loss is None or start is None or best is None:
        return None if loss is None else fixed(loss)
    gain, kept = float(start) - float(best), float(start) - float(loss)
    return f"{fixed(loss)} ({kept / gain:.0%})" if gain and math.isfinite(kept / gain) else fixed(loss)


def difference(item: Mapping[str, Any] | None, with_worst: bool = False) -> str | None:
    """A difference with its errors; a star where it is clear, and the domain that fares worst if asked for."""
    if item is None:
        return None
    return f"{signed(item['difference'])}{_errors(item)}{' *' if item['is_clear'] else ''}" + (
        _worst(item["domains"]) if with_worst else ""
    )


def _errors(item: Mapping[str, Any]) -> str:
    """± the error over documents, and ± that over seeds where it is known."""
    known = (item.get(name) for name in ("standard_error", "seed_error"))
    return "".join(f" ± {fixed(error)}" for error in known if error is not None)


def _worst(domains: Mapping[str, Any]) -> str:
    label = max(domains, key=lambda name: float(domains[name]["difference"]))
    return f" ({label} {signed(domains[label]['difference'], 3)})"


def routing_lines(rows: Rows) -> list[str]:
    """What of the active parameters carries nothing but routing: rows, and channels of the evidence router."""
    found = [
        f"{plain(name)} {count(row['routing_parameters'])}"
        for name, row in rows.items()
        if row.get("routing_parameters")
    ]
    return ["", f"Of the active parameters, these carry nothing but routing: {', '.join(found)}."] if found else []


def doubts(results: Results) -> list[str]:
    """Sentences that must stand beside a good mean: where the chosen model is worse, and what is not certain."""
    differences, found = results.get("differences", {}), list[str]()
    for other, words in REFERENCES.items():
        for probe, item in differences.get(other, {}).items():
            change = float(item["difference"])
            if probe not in WHERE or not math.isfinite(change):
                continue
            if probe == "text" and item["standard_error"] is not None and not item["is_clear"]:
                found.append(f"the difference from {words} is within two standard errors ({difference(item)})")
            elif probe != "text" and change > 0:
                found.append(f"{WHERE[probe]} it is worse than {words} by {_size(item)}")
    worse = {probe: list(_worse_domains(item)) for probe, item in differences.get("backbone", {}).items()}
    return found + [
        f"{WHERE[probe]} these are worse than with the backbone: {', '.join(labels)}"
        for probe, labels in worse.items()
        if labels and probe in WHERE
    ]


def likely_reason(results: Results, best: float) -> str:
    """Why the chosen model is not better than the best one without experts, and which setting to change; or nothing."""
    models = results["models"]
    oracle = float(models.get("oracle", {}).get("mean_loss", math.nan))
    start, loss = (float(models.get(name, {}).get("mean_loss", math.nan)) for name in ("backbone", results["chosen"]))
    found = []
    if oracle >= best:
        found.append(
            f"the experts themselves: even the best one of each domain has {fixed(oracle)}, so no routing could win; "
            "give them more text or more different parts (experts.steps, experts.count, partition.method)"
        )
    elif start > oracle and loss > oracle:
        found.append(
            f"the routing, which keeps {(start - loss) / (start - oracle):.0%} of what the best expert of each domain "
            "gains (assembly.router, experts.counted_pairs, assembly.token_pairs)"
        )
    each = _tokens_per_parameter(models.get("backbone", {}))
    if 0 < each < FEW_TOKENS:
        found.append(
            f"a backbone of {each:.1f} tokens for each parameter, where {USUAL_TOKENS} are usual, so that any further "
            "training helps everywhere (backbone.steps)"
        )
    return f"Likely reason: {'; and '.join(found)}." if found else ""


def _tokens_per_parameter(row: Mapping[str, Any]) -> float:
    tokens, parameters = row.get("training_tokens"), row.get("parameters")
    return float(tokens) / float(parameters) if tokens and parameters else 0.0


def _worse_domains(item: Mapping[str, Any]) -> Iterator[str]:
    for label, domain in item.get("domains", {}).items():
        if float(domain["difference"]) > 0:
            yield f"{label} (by {_size(domain)})"


def _size(item: Mapping[str, Any]) -> str:
    return f"{fixed(item['difference'])}{_errors(item)}"


def finding_tables(results: Results) -> list[Table]:
    """All tables of an evaluation that have records."""
    shown = {name: row for name, row in results["models"].items() if kind_of(name) != "expert"}
    chosen, anchors = results["chosen"], ("backbone", "oracle")  # the oracle stands for the single experts
    found = [
        probe_table(shown, "model", "Other text than the domains' own", f"Mean loss in nats per token. {SWITCH_WORDS}"),
        _difference_table(results, f"The {chosen} model less the others"),
        _domain_table(results, f"The {chosen} model less the backbone, by domain"),
        _parts_table(shown, "general", "Text of no domain"),
        position_table(
            shown,
            "model",
            "By position in the window",
            "Mean loss, and the share of the oracle's gain over the backbone that is kept there.",
            anchors=anchors,
        ),
        position_table(
            shown,
            "model",
            "By distance from the switch",
            "The same behind a switch; the oracle knows the new domain from its first token on.",
            "switch",
            anchors,
        ),
        *test_tables(results),
        error_table(results),
    ]
    return [table for table in found if table.records]


def test_tables(results: Results) -> Iterator[Table]:
    """Error rates of each model on each test set beside the domains; nothing where there are none."""
    rows = {name: row["tests"] for name, row in results["models"].items() if row.get("tests")}
    sets = dict.fromkeys(name for tests in rows.values() for name in tests)
    if sets:
        columns = [
            Column(f"{name} {rate.upper()} %", _of_test(name, rate), decimals(1))
            for name in sets
            for rate in ("wer", "cer")
        ]
        counts = {name: test["utterances"] for tests in rows.values() for name, test in tests.items()}
        words = f"In %, of {', '.join(f'{counts[name]} utterances of {name}' for name in sets)}; lower is better."
        yield Table([name_column("model"), *columns], [*rows.items()], "Test sets beside the domains", words)


def _of_test(name: str, rate: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: 100 * float(record[1][name][rate]) if name in record[1] else None


def error_table(results: Results) -> Table:
    """The worst utterances of the model to use, or of the backbone where there is none: audio, said, written."""
    header = ["domain", "audio", "reference", "hypothesis", "errors", "words"]
    rows = [[str(one[name]) for name in header] for one in results.get("errors") or ()]
    words = "Utterances with the most word errors of each domain; those of every model are in utterances.json."
    return listing(header, rows, 4, "Worst utterances", words)


def _difference_table(results: Results, title: str) -> Table:
    """The chosen model less each other one on each probe, with standard errors."""
    known = ["text", *probes_in(row.get("probes", {}) for row in results["models"].values())]
    columns = [name_column("beside"), *(_difference_column(name) for name in known)]
    columns.append(Column("documents", lambda record: record[1].get("text", {}).get("documents")))
    words = (
        "Mean loss less theirs on the same text, ± its standard error over documents; negative is better for it, and "
        "* is more than two standard errors."
    )
    return Table(columns, [*results.get("differences", {}).items()], title, words)


def _difference_column(probe: str) -> Column:
    return Column(PROBES[probe], lambda record: difference(record[1].get(probe)))


def _domain_table(results: Results, title: str) -> Table:
    """The chosen model less the backbone by domain, on each probe of the domains."""
    found = results.get("differences", {}).get("backbone", {})
    domains = {name: found[name].get("domains", {}) for name in ("text", "switch", "mixed") if name in found}
    rows = [[label, *(difference(of.get(label)) for of in domains.values())] for label in results["domains"]]
    header = ["domain", *(PROBES[name] for name in domains)]
    words = "As above; for a switch the domain is that of the second half."
    return listing(header, rows if domains else [], title=title, words=words)


def _parts_table(rows: Rows, probe: str, title: str) -> Table:
    """Mean loss of each model on each part of a probe, such as the texts of no domain."""
    found = {name: row.get("probes", {}).get(probe, {}).get("domains", {}) for name, row in rows.items()}
    labels = list(dict.fromkeys(label for domains in found.values() for label in domains))
    cells = [
        [name, *(fixed(domains[label]["loss"]) if label in domains else MISSING for label in labels)]
        for name, domains in found.items()
        if domains
    ]
    return listing(["model", *labels], cells, title=title, words="Mean loss in nats per token.")


def task_tables(results: Results) -> Iterator[Table]:
    """For each task how the models did, then what they replied to a few prompts."""
    for label, task in (results.get("tasks") or {}).items():
        words = " ".join([f"In per cent, over {task['prompts']} prompts; higher is better.", *task["notes"]])
        yield reply_table(task["models"], "model", f"Task {label}", words)
        models = list(task["models"])
        rows = [
            [one["prompt"], " / ".join(one["references"]), *(one["replies"].get(name, MISSING) for name in models)]
            for one in task["examples"]
        ]
        header = ["prompt", "reference", *models]
        yield listing(header, rows, len(header), f"Replies of task {label}", "The first prompts, of all models.")


def harness_tables(results: Results) -> Iterator[Table]:
    """For each task of lm-eval what the models reached, with standard errors."""
    for task, found in (results.get("harness") or {}).items():
        metrics = dict.fromkeys(metric for row in found["models"].values() for metric in row)
        rows = [
            [name, *(_with_error(row.get(metric), found["errors"].get(name, {}).get(metric)) for metric in metrics)]
            for name, row in found["models"].items()
        ]
        yield listing(["model", *metrics], rows, title=f"lm-eval: {task}", words="As lm-eval says, ± standard errors.")


def _with_error(value: float | None, error: float | None) -> str:
    return MISSING if value is None else fixed(value) + (f" ± {fixed(error)}" if error else "")


def reply_table(rows: Rows, first: str, title: str, words: str) -> Table:
    """Each metric of the replies of each row, in per cent."""
    metrics = dict.fromkeys(metric for found in rows.values() for metric in found)
    columns = [Column(TASK_METRICS.get(metric, metric), named(metric), decimals(1)) for metric in metrics]
    return Table([name_column(first), *columns], [*rows.items()], title, words)


def chat_table(results: Results) -> Table:
    """Each prompt with its known answer and what the models reply."""
    chat = results.get("chat") or {"questions": [], "replies": {}}
    replies, questions = chat["replies"], enumerate(chat["questions"])
    rows = [[one["prompt"], one["answer"], *(texts[i] for texts in replies.values())] for i, one in questions]
    header = ["prompt", "known answer", *replies]
    return listing(header, rows, len(header), "Replies to chat prompts", "The likeliest token each time.")
