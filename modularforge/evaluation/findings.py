"""What could refute a good mean, as rows and sentences: other text, other places, other models, and how sure it is.

Works on the results of an evaluation, also on older ones, which have less of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Rows = tuple[list[str], list[list[str]]]
PROBES = {"switch": "behind a switch", "mixed": "mixed passages", "general": "no domain", "chat": "chat"}
WHERE = {
    "text": "on plain text",
    "switch": "behind a switch of domain",
    "mixed": "in mixed documents",
    "general": "on text of no domain",
    "chat": "on known answers to chat prompts",
}
RIVALS = {"backbone": "the backbone", "dense": "the dense model"}


def probe_rows(results: Results) -> Rows:
    """Mean loss of each model on each probe; empty where only text was measured."""
    names = _probes(results)
    rows = []
    for model, row in _shown(results).items():
        probes = row.get("probes", {})
        cells = [fixed(probes[name]["mean_loss"]) if name in probes else "–" for name in names]
        rows.append([model, fixed(row["mean_loss"]), *cells])
    return ["model", "text", *(PROBES[name] for name in names)], rows if names else []


def difference_rows(results: Results) -> Rows:
    """The chosen model less each other one on each probe, with standard errors."""
    names = ["text", *_probes(results)]
    rows = [
        [other, *(_cell(found.get(name)) for name in names), str(found.get("text", {}).get("documents", "–"))]
        for other, found in results.get("differences", {}).items()
    ]
    return ["beside", "text", *(PROBES[name] for name in names[1:]), "documents"], rows


def domain_rows(results: Results) -> Rows:
    """The chosen model less the backbone by domain, on each probe of the domains."""
    found = results.get("differences", {}).get("backbone", {})
    names = [name for name in ("text", "switch", "mixed") if name in found]
    rows = [
        [label, *(_cell(found[name].get("domains", {}).get(label)) for name in names)] for label in results["domains"]
    ]
    return ["domain", *(PROBES.get(name, name) for name in names)], rows if names else []


def text_rows(results: Results, probe: str) -> Rows:
    """Mean loss of each model on each part of a probe, such as the texts of no domain."""
    found = {model: row.get("probes", {}).get(probe, {}).get("domains", {}) for model, row in _shown(results).items()}
    labels = list(dict.fromkeys(label for domains in found.values() for label in domains))
    rows = [
        [model, *(fixed(domains[label]["loss"]) if label in domains else "–" for label in labels)]
        for model, domains in found.items()
        if domains
    ]
    return ["model", *labels], rows


def position_rows(results: Results, probe: str = "text") -> Rows:
    """Mean loss by position, and the share of the oracle's gain over the backbone that is kept there."""
    places = {model: _positions(row, probe) for model, row in _shown(results).items()}
    names = list(dict.fromkeys(name for found in places.values() for name in found))
    first, best = places.get("backbone", {}), places.get("oracle", {})
    rows = [
        [model, *(_place(found.get(name), first.get(name), best.get(name)) for name in names)]
        for model, found in places.items()
        if found
    ]
    return ["model", *names], rows


def chat_rows(results: Results) -> Rows:
    """Each prompt with its known answer and what the models reply."""
    chat = results.get("chat") or {"questions": [], "replies": {}}
    replies = chat["replies"]
    rows = [
        [item["prompt"], item["answer"], *(texts[index] for texts in replies.values())]
        for index, item in enumerate(chat["questions"])
    ]
    return ["prompt", "known answer", *replies], rows


def doubts(results: Results) -> list[str]:
    """Sentences that must stand beside a good mean: where the chosen model is worse, and what is not certain."""
    differences, found = results.get("differences", {}), list[str]()
    for rival, words in RIVALS.items():
        for probe, item in differences.get(rival, {}).items():
            change = float(item["difference"])
            if probe not in WHERE or not math.isfinite(change):
                continue
            if probe == "text" and item["standard_error"] is not None and not item["is_clear"]:
                found.append(f"the difference from {words} is within two standard errors ({_cell(item)})")
            elif probe != "text" and change > 0:
                found.append(f"{WHERE[probe]} it is worse than {words} by {_size(item)}")
    worse = {probe: list(_worse_domains(item)) for probe, item in differences.get("backbone", {}).items()}
    found += [
        f"{WHERE[probe]} these are worse than with the backbone: {', '.join(labels)}"
        for probe, labels in worse.items()
        if labels and probe in WHERE
    ]
    return found


def _worse_domains(item: Mapping[str, Any]) -> Iterator[str]:
    for label, domain in item.get("domains", {}).items():
        if float(domain["difference"]) > 0:
            yield f"{label} (by {_size(domain)})"


def _shown(results: Results) -> dict[str, Any]:
    """All models but the single experts, whose oracle stands for them."""
    return {name: row for name, row in results["models"].items() if not name.startswith("expert-")}


def _probes(results: Results) -> list[str]:
    known = {name for row in results["models"].values() for name in row.get("probes", {})}
    return [name for name in PROBES if name in known]


def _positions(row: Mapping[str, Any], probe: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (row if probe == "text" else row.get("probes", {}).get(probe, {})).get("positions", {})
    return found


def _place(loss: Any, first: Any, best: Any) -> str:
    if loss is None:
        return "–"
    if first is None or best is None:
        return fixed(loss)
    gain, kept = float(first) - float(best), float(first) - float(loss)
    return f"{fixed(loss)} ({kept / gain:.0%})" if gain and math.isfinite(kept / gain) else fixed(loss)


def _cell(item: Mapping[str, Any] | None) -> str:
    """A difference with its standard error; a star where it is more than two of them."""
    if item is None:
        return "–"
    error = item["standard_error"]
    known = f" ± {float(error):.4f}" if error is not None else ""
    return f"{float(item['difference']):+.4f}{known}{' *' if item['is_clear'] else ''}"


def _size(item: Mapping[str, Any]) -> str:
    error = item["standard_error"]
    return f"{float(item['difference']):.4f}" + (f" ± {float(error):.4f}" if error is not None else "")


def fixed(value: Any, digits: int = 4) -> str:
    """A number with so many decimals; JSON holds one that is not finite as text."""
    return f"{float(value):.{digits}f}"


def sections(results: Results) -> list[tuple[str, str, Rows]]:
    """All tables that have rows: title, explanation, header and rows."""
    all_probes: Sequence[tuple[str, str, Rows]] = (
        (
            "Other text than the domains' own",
            "Mean loss in nats per token. Behind a switch: the second half of windows whose first half is another "
            "domain's text. Mixed passages: documents of 16 to 96 tokens of one domain after another.",
            probe_rows(results),
        ),
        (
            f"The {results['chosen']} model less the others",
            "Mean loss less theirs on the same text, ± its standard error over documents; negative is better for it, "
            "and * is more than two standard errors.",
            difference_rows(results),
        ),
        (
            f"The {results['chosen']} model less the backbone, by domain",
            "As above; for a switch the domain is that of the second half.",
            domain_rows(results),
        ),
        ("Text of no domain", "Mean loss in nats per token.", text_rows(results, "general")),
        (
            "By position in the window",
            "Mean loss, and the share of the oracle's gain over the backbone that is kept there.",
            position_rows(results),
        ),
        (
            "By distance from the switch",
            "The same behind a switch; the oracle knows the new domain from its first token on.",
            position_rows(results, "switch"),
        ),
    )
    return [item for item in all_probes if item[2][1]]
