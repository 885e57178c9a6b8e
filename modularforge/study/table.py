"""The table of a study: each variant's losses, cost and gains over all seeds, as JSON, Markdown and a plot.

Gains compare rows of the same seed and of the same tokens for backbone and experts: the share of the oracle's gain over
the backbone that is kept, the distance to the dense model, and the domain that fares worst against the backbone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoints import paths
from checkpoints.markdown import plain
from checkpoints.markdown import table as markdown_table
from checkpoints.redact import redact_values
from modularforge.study.compared import compared, probe_means, sections
from modularforge.study.figure import draw_table
from modularforge.study.runs import Runs
from modularforge.study.study_file import reference_of

Results = Mapping[str, Sequence[Mapping[str, Any]]]
Row = dict[str, Any]
ORACLE = "oracle"
RIVALS = ("backbone", "dense", "joint")
COST = ("parameters", "active_parameters", "flops_per_token", "training_tokens")


def write_table(runs: Runs, split: str, results: Results, with_plot: bool = False) -> str:
    """Write table-SPLIT.json and .md (and .png) at the study's root; returns the URL of the Markdown."""
    table = make_table(runs.study.name, split, results, reference_of(runs.study), runs.study.compare)
    root = paths.join(runs.root, f"table-{split}")
    paths.replace_bytes(f"{root}.json", (json.dumps(redact_values(table), indent=1, allow_nan=False) + "\n").encode())
    paths.replace_bytes(f"{root}.md", markdown(table).encode())
    if with_plot and table["rows"]:
        paths.replace_bytes(f"{root}.png", draw_table(table))
    return f"{root}.md"


def make_table(
    name: str, split: str, results: Results, reference: str, compare: Sequence[str] | None = None
) -> dict[str, Any]:
    """Rows by variant, each with its mean and spread over seeds; `reference` is the recipe whose oracle counts.

    `compare` names the rows that all are held against; None is backbone, dense and joint of the same seed and tokens.
    """
    by_seed = _rows_by_seed(results)
    rows = {label: _summary(found, results, reference) for label, found in by_seed.items()}
    for label, found in by_seed.items():
        rows[label]["differences"] = _differences(found, by_seed, results, reference, compare)
    domains = next((list(next(iter(found.values()))["domains"]) for found in by_seed.values()), [])
    return {
        "name": name,
        "split": split,
        "reference": reference,
        "domains": domains,
        "rows": rows,
        "removal": _removals(results),
        "calibration": _calibrations(results),
    }


def _rows_by_seed(results: Results) -> dict[str, dict[int, Row]]:
    """Each table row, by label and seed, with kind and recipe."""
    found: dict[str, dict[int, Row]] = {}
    for variant, of_seeds in results.items():
        for result in of_seeds:
            for ending, row in result["rows"].items():
                about = {name: result[name] for name in ("kind", "recipe", "seed", "tokens")}
                label = f"{variant}: {ending}" if ending else variant
                found.setdefault(label, {})[int(result["seed"])] = {**row, **about}
    return found


def _peer(results: Results, kind: str, ending: str, row: Row, reference: str) -> Row | None:
    """The row of a kind with the seed and the tokens of `row`, of the reference recipe if it has one."""
    found = [
        result
        for of_seeds in results.values()
        for result in of_seeds
        if result["kind"] == kind and (result["seed"], result["tokens"]) == (row["seed"], row["tokens"])
    ]
    found.sort(key=lambda result: bool(result["recipe"] != reference))
    return found[0]["rows"][ending] if found else None


def _summary(found: Mapping[int, Row], results: Results, reference: str) -> Row:
    """One row of the table over its seeds."""
    anchors = {
        seed: {
            "backbone": _peer(results, "backbone", "", row, reference),
            "dense": _peer(results, "dense", "", row, reference),
            ORACLE: _peer(results, "experts", ORACLE, row, reference),
        }
        for seed, row in found.items()
    }
    first = next(iter(found.values()))
    losses = {str(seed): row["mean_loss"] for seed, row in found.items()}
    domains = {
        label: statistics.fmean(row["domains"][label]["loss"] for row in found.values()) for label in first["domains"]
    }
    kept = [_kept(row, anchors[seed]) for seed, row in found.items()]
    worst = [_worst(row, anchors[seed]["backbone"]) for seed, row in found.items()]
    dense = [_difference(row, anchors[seed]["dense"]) for seed, row in found.items()]
    return {
        "kind": first["kind"],
        "recipe": first["recipe"],
        "mean_loss": statistics.fmean(losses.values()),
        "standard_deviation": _spread(list(losses.values())),
        "losses": losses,
        "bits_per_byte": statistics.fmean(row["bits_per_byte"] for row in found.values()),
        "domains": domains,
        "kept": _mean(kept),
        "kept_spread": _spread([value for value in kept if value is not None]),
        "kept_by_position": {
            name: _mean([_kept(row, anchors[seed], name) for seed, row in found.items()]) for name in first["positions"]
        },
        "minus_dense": _mean(dense),
        "minus_dense_spread": _spread([value for value in dense if value is not None]),
        "worst_domain": max((item for item in worst if item), key=lambda item: float(item["change"]), default=None),
        "probes": probe_means(list(found.values())),
        **{name: first[name] for name in COST},
        "routing_parameters": first.get("routing_parameters"),
    }


def _differences(
    found: Mapping[int, Row],
    by_seed: Mapping[str, Mapping[int, Row]],
    results: Results,
    reference: str,
    compare: Sequence[str] | None,
) -> dict[str, Any]:
    """The row less each that it is held against, of the same seeds."""

    def rival(name: str, seed: int, row: Row) -> Row | None:
        return _peer(results, name, "", row, reference) if compare is None else by_seed.get(name, {}).get(seed)

    held = {}
    for name in RIVALS if compare is None else compare:
        pairs = [(row, other) for seed, row in found.items() if (other := rival(name, seed, row))]
        if pairs and all(row["documents"] is not other["documents"] for row, other in pairs):
            held[name] = compared(pairs)
    return {name: item for name, item in held.items() if item}


def _kept(row: Row, anchors: Mapping[str, Row | None], position: str | None = None) -> float | None:
    """Share of the oracle's gain over the backbone, of all tokens or of those at some positions in the window."""
    backbone, oracle = anchors["backbone"], anchors[ORACLE]
    if not backbone or not oracle:
        return None
    mine, start, best = (
        float(item["mean_loss"] if position is None else item["positions"][position])
        for item in (row, backbone, oracle)
    )
    return None if start == best else (start - mine) / (start - best)


def _difference(row: Row, other: Row | None) -> float | None:
    return float(row["mean_loss"] - other["mean_loss"]) if other else None


def _worst(row: Row, backbone: Row | None) -> dict[str, Any] | None:
    """The domain whose loss rose most, or fell least, against the backbone."""
    if backbone is None:
        return None
    changes = {label: item["loss"] - backbone["domains"][label]["loss"] for label, item in row["domains"].items()}
    label = max(changes, key=lambda name: float(changes[name]))
    return {"domain": label, "change": changes[label]}


def _removals(results: Results) -> dict[str, Any]:
    """For each variant: the largest and the mean change in other domains when an expert is removed, over all seeds."""
    found = {}
    for variant, of_seeds in results.items():
        items = [result["removal"] for result in of_seeds if (result.get("removal") or {}).get("others") is not None]
        if items:
            largest = max((item["others"] for item in items), key=abs)
            found[variant] = {"others": largest, "others_mean": statistics.fmean(i["others_mean"] for i in items)}
    return found


def _calibrations(results: Results) -> dict[str, Any]:
    """How many seeds kept their calibration, for each variant that has one."""
    found = {}
    for variant, of_seeds in results.items():
        items = [result["calibration"] for result in of_seeds if result.get("calibration")]
        if items:
            found[variant] = {"kept": sum(bool(item["kept"]) for item in items), "seeds": len(items)}
    return found


def markdown(table: Mapping[str, Any]) -> str:
    """The table as a page."""
    where = (
        "the deciding half of the validation documents, which no variant was fitted to"
        if table["split"] == "validation"
        else "the test split"
    )
    lines = [
        f"# {plain(table['name'])}",
        "",
        f"Mean loss in nats per token on {where}; domains weigh alike; ± is the standard deviation over seeds.",
        "`kept` is the share of the oracle's gain over the backbone: the oracle takes the best expert of each domain, "
        f"chosen on the text that is measured (recipe {plain(table['reference'])} where tokens are the same). "
        "`to dense` is the distance to the dense model of the same seed and tokens. `worst` is the domain that fares "
        "worst against the backbone, in any seed.",
        "",
        *_lines(*_main_rows(table)),
        *_routing_lines(table),
        "",
        "Loss by domain, mean over seeds:",
        "",
        *_lines(*_domain_rows(table)),
    ]
    lines += ["", "Share of the oracle's gain that is kept, by position in the window:", ""]
    lines += _lines(*_position_rows(table))
    for words, header, rows in sections(table):
        lines += ["", plain(words), "", *_lines(header, rows)]
    if table["removal"]:
        lines += ["", "What removing one expert changes in the domains of the others (relative loss):", ""]
        rows = [[name, f"{i['others']:+.2%}", f"{i['others_mean']:+.2%}"] for name, i in table["removal"].items()]
        lines += _lines(["variant", "largest", "mean"], rows)
    if table["calibration"]:
        rejected = [
            f"{plain(name)} ({i['seeds'] - i['kept']} of {i['seeds']})" for name, i in table["calibration"].items()
        ]
        rejected = [
            text for text, i in zip(rejected, table["calibration"].values(), strict=True) if i["kept"] < i["seeds"]
        ]
        lines += ["", f"Calibrations that were not kept: {', '.join(rejected) or 'none'}."]
    return "\n".join([*lines, ""])


def _main_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "variant",
        "seeds",
        "mean loss",
        "±",
        "to dense",
        "kept",
        "worst",
        "total",
        "active",
        "FLOPs/token",
        "tokens",
    ]
    rows = []
    for name, row in table["rows"].items():
        worst = row["worst_domain"]
        rows.append([
            name,
            str(len(row["losses"])),
            f"{row['mean_loss']:.4f}",
            _or_dash(row["standard_deviation"], ".4f"),
            _or_dash(row["minus_dense"], "+.4f"),
            _or_dash(row["kept"], ".0%"),
            f"{worst['domain']} {worst['change']:+.3f}" if worst else "–",
            *(_count(row[column]) for column in COST),
        ])  # fmt: skip
    return header, rows


def _routing_lines(table: Mapping[str, Any]) -> list[str]:
    """What of the active parameters carries nothing but routing: rows, and channels of the evidence router."""
    found = [
        f"{plain(name)} {_count(row['routing_parameters'])}"
        for name, row in table["rows"].items()
        if row.get("routing_parameters")
    ]
    return ["", f"Of the active parameters, these carry nothing but routing: {', '.join(found)}."] if found else []


def _domain_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, *(f"{row['domains'][label]:.3f}" for label in table["domains"])] for name, row in table["rows"].items()
    ]
    return ["variant", *table["domains"]], rows


def _position_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = next((list(row["kept_by_position"]) for row in table["rows"].values()), [])
    rows = [
        [label, *(_or_dash(row["kept_by_position"].get(name), ".0%") for name in names)]
        for label, row in table["rows"].items()
    ]
    return ["variant", *names], rows


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_table(list(map(plain, header)), [list(map(plain, row)) for row in rows], numbers_from=1)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: int | None) -> str:
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
