"""The table of a study as numbers: each variant's losses, cost and gains over all seeds.

Gains compare rows of the same seed and of the same tokens for backbone and experts: the share of the oracle's gain over
the backbone that is kept, the distance to the dense model, and the domain that fares worst against the backbone. They
are of the metric that decides; what is of single documents, places and domains follows from losses.
Differences are on the same documents, with errors over documents and seeds. Both count: that over documents is of the
mean over the seeds, which read the same text; that over seeds is what another training would change. A difference is
clear when it is more than twice the root of their squares' sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from modularforge.evaluation.paired import CLEAR_ERRORS, Difference, mean_sums, paired_difference
from modularforge.evaluation.probes import PROBES
from modularforge.observe.metrics import DECISIVE, ERROR_RATES, MEASURED

Results = Mapping[str, Sequence[Mapping[str, Any]]]
Row = dict[str, Any]
ORACLE = "oracle"
REFERENCES = ("backbone", "dense", "joint", "joint_lora", "joint_lora_wide")
COST = ("parameters", "active_parameters", "flops_per_token", "training_tokens", "trained_bytes", "processor_seconds")


def make_table(
    name: str, split: str, results: Results, reference: str, compare: Sequence[str] | None = None
) -> dict[str, Any]:
    """Rows by variant, each with its mean and spread over seeds; `reference` is the recipe whose oracle counts.

    `compare` names the rows that all are held against; None is `REFERENCES`, of the same seed and tokens.
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
    losses = {str(seed): row[DECISIVE.column] for seed, row in found.items()}
    domains = {
        label: statistics.fmean(row["domains"][label]["loss"] for row in found.values()) for label in first["domains"]
    }
    kept = [_kept(row, anchors[seed]) for seed, row in found.items()]
    worst = [_worst(row, anchors[seed]["backbone"]) for seed, row in found.items()]
    dense = [_difference(row, anchors[seed]["dense"]) for seed, row in found.items()]
    return {
        "kind": first["kind"],
        "recipe": first["recipe"],
        DECISIVE.column: statistics.fmean(losses.values()),
        "standard_deviation": _spread(list(losses.values())),
        "losses": losses,
        **_other_metrics([*found.values()]),
        "domains": domains,
        **_rates(list(found.values())),
        "kept": _mean(kept),
        "kept_spread": _spread([value for value in kept if value is not None]),
        "kept_by_position": {
            name: _mean([_kept(row, anchors[seed], name) for seed, row in found.items()]) for name in first["positions"]
        },
        "minus_dense": _mean(dense),
        "minus_dense_spread": _spread([value for value in dense if value is not None]),
        "worst_domain": max((item for item in worst if item), key=lambda item: float(item["change"]), default=None),
        "probes": probe_means(list(found.values())),
        **_replies(list(found.values())),
        **{name: first.get(name) for name in COST},  # results of earlier versions lack some
        "routing_parameters": first.get("routing_parameters"),
    }


def _other_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """The mean over seeds of the metrics that do not decide, as far as these rows have them."""
    columns = [one.column for one in (*MEASURED, *ERROR_RATES) if one is not DECISIVE]
    return {name: statistics.fmean(row[name] for row in rows) for name in columns if all(name in row for row in rows)}


def _rates(rows: Sequence[Row]) -> dict[str, Any]:
    """Error rates of each domain, and the seconds that the jobs took, in the mean over seeds; nothing of text."""
    labels = [label for label, item in rows[0]["domains"].items() if "wer" in item]
    if not labels:
        return {}
    rates = {
        label: {name: statistics.fmean(row["domains"][label][name] for row in rows) for name in ("wer", "cer")}
        for label in labels
    }
    seconds = [row["training_seconds"] for row in rows]
    return {"rates": rates, "training_seconds": None if None in seconds else statistics.fmean(seconds)}


def _replies(rows: Sequence[Row]) -> dict[str, Any]:
    """By task: the mean over seeds of each metric; nothing where a row was asked nothing."""
    if not all("tasks" in row for row in rows):
        return {}
    tasks = {
        task: {metric: statistics.fmean(row["tasks"][task][metric] for row in rows) for metric in metrics}
        for task, metrics in rows[0]["tasks"].items()
    }
    return {"tasks": tasks}


def _differences(
    found: Mapping[int, Row],
    by_seed: Mapping[str, Mapping[int, Row]],
    results: Results,
    reference: str,
    compare: Sequence[str] | None,
) -> dict[str, Any]:
    """The row less each that it is held against, of the same seeds."""

    def reference_row(name: str, seed: int, row: Row) -> Row | None:
        return _peer(results, name, "", row, reference) if compare is None else by_seed.get(name, {}).get(seed)

    held = {}
    for name in REFERENCES if compare is None else compare:
        pairs = [(row, other) for seed, row in found.items() if (other := reference_row(name, seed, row))]
        if pairs and all(row["documents"] is not other["documents"] for row, other in pairs):
            held[name] = compared(pairs)
    return {name: item for name, item in held.items() if item}


def compared(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Row]:
    """By probe: the mean difference of the first rows from the second ones, one pair a seed, with both errors."""
    names = [name for name in PROBES if all(name in row["documents"] for pair in pairs for row in pair)]
    found = {name: _on_probe(name, pairs) for name in names}
    return {name: item for name, item in found.items() if item is not None}


def _on_probe(name: str, pairs: Sequence[tuple[Row, Row]]) -> Row | None:
    mine, other = ([row["documents"][name] for row in rows] for rows in zip(*pairs, strict=True))
    each = [paired_difference(a, b) for a, b in zip(mine, other, strict=True)]
    if any(item is None for item in each) or any(item["tokens"] != mine[0]["tokens"] for item in mine):
        return None
    means = mean_sums(mine), mean_sums(other)
    whole = paired_difference(*means)
    assert whole is not None
    domains = {label: paired_difference(*means, [label]) for label in mine[0]["tokens"]}
    return {
        **_with_seeds(whole, [item.difference for item in each if item]),
        "domains": {label: item.values() for label, item in domains.items() if item},
    }


def _with_seeds(whole: Difference, of_seeds: Sequence[float]) -> Row:
    seeds = statistics.stdev(of_seeds) / math.sqrt(len(of_seeds)) if len(of_seeds) > 1 else None
    errors = [error for error in (whole.standard_error, seeds) if error is not None]
    is_clear = whole.standard_error is not None and abs(whole.difference) > CLEAR_ERRORS * math.hypot(*errors)
    return {**whole.values(), "seed_error": seeds, "seeds": len(of_seeds), "is_clear": is_clear}


def probe_means(rows: Sequence[Row]) -> dict[str, Row]:
    """By probe: the mean over seeds of its loss, also by place."""
    names = [name for name in PROBES if all(name in row["probes"] for row in rows)]
    return {name: _mean_probe([row["probes"][name] for row in rows]) for name in names}


def _mean_probe(items: Sequence[Row]) -> Row:
    return {
        "mean_loss": statistics.fmean(item["mean_loss"] for item in items),
        "positions": {
            place: statistics.fmean(item["positions"][place] for item in items) for place in items[0]["positions"]
        },
        "domains": {
            label: statistics.fmean(item["domains"][label]["loss"] for item in items) for label in items[0]["domains"]
        },
    }


def _kept(row: Row, anchors: Mapping[str, Row | None], position: str | None = None) -> float | None:
    """Share of the oracle's gain over the backbone, of all tokens or of those at some positions in the window."""
    backbone, oracle = anchors["backbone"], anchors[ORACLE]
    if not backbone or not oracle:
        return None
    mine, start, best = (
        float(item[DECISIVE.column] if position is None else item["positions"][position])
        for item in (row, backbone, oracle)
    )
    return None if start == best else (start - mine) / (start - best)


def _difference(row: Row, other: Row | None) -> float | None:
    return float(row[DECISIVE.column] - other[DECISIVE.column]) if other else None


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


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
