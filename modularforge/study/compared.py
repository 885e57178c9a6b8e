"""Rows of a study held against each other: differences on the same documents, with errors over documents and seeds.

Both errors count. That over documents is of the mean over the seeds, which read the same text; that over seeds is what
another training would change. A difference is called clear when it is more than twice the root of their squares' sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from modularforge.evaluation.findings import PROBES
from modularforge.evaluation.paired import CLEAR_ERRORS, Difference, mean_sums, paired_difference
from modularforge.evaluation.probes import TEXT

Row = dict[str, Any]
Pairs = Sequence[tuple[Row, Row]]


def compared(pairs: Pairs) -> dict[str, Row]:
    """By probe: the mean difference of the first rows from the second ones, one pair a seed, with both errors."""
    names = [name for name in (TEXT, *PROBES) if all(name in row["documents"] for pair in pairs for row in pair)]
    found = {name: _on_probe(name, pairs) for name in names}
    return {name: item for name, item in found.items() if item is not None}


def _on_probe(name: str, pairs: Pairs) -> Row | None:
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


def sections(table: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the probes and of the differences: what each says, header and rows."""
    found = [
        (
            "Loss on other text than the domains' own: the second half of windows whose first half is another domain's "
            "text; documents of passages of different domains; text of no domain:",
            *_probe_rows(table),
        ),
        ("Loss behind a switch of domain, by distance from it:", *_distance_rows(table)),
    ]
    for rival in dict.fromkeys(name for row in table["rows"].values() for name in row["differences"]):
        words = (
            f"Less {rival}, on the same documents ± the error over documents, ± over seeds where there are more; * is "
            "more than two errors; in brackets the domain that fares worst:"
        )
        found.append((words, *_difference_rows(table, rival)))
    return [item for item in found if item[2]]


def _probe_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [(label, row) for label, row in table["rows"].items() if row["probes"]]
    names = [name for name in PROBES if any(name in row["probes"] for _, row in rows)]
    cells = [
        [
            label,
            f"{row['mean_loss']:.4f}",
            *(f"{row['probes'][name]['mean_loss']:.4f}" if name in row["probes"] else "–" for name in names),
        ]
        for label, row in rows
    ]
    return ["variant", "text", *(PROBES[name] for name in names)], cells


def _distance_rows(table: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    found = {
        label: row["probes"]["switch"]["positions"] for label, row in table["rows"].items() if "switch" in row["probes"]
    }
    names = list(dict.fromkeys(name for places in found.values() for name in places))
    rows = [
        [label, *(f"{places[name]:.4f}" if name in places else "–" for name in names)]
        for label, places in found.items()
    ]
    return ["variant", *names], rows


def _difference_rows(table: Mapping[str, Any], rival: str) -> tuple[list[str], list[list[str]]]:
    rows = [(label, row["differences"][rival]) for label, row in table["rows"].items() if rival in row["differences"]]
    names = [name for name in (TEXT, *PROBES) if any(name in found for _, found in rows)]
    cells = [[label, *(_cell(found.get(name)) for name in names)] for label, found in rows]
    return ["variant", *(PROBES.get(name, name) for name in names)], cells


def _cell(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return "–"
    errors = [f" ± {item[name]:.4f}" for name in ("standard_error", "seed_error") if item[name] is not None]
    worst = max(item["domains"], key=lambda label: float(item["domains"][label]["difference"]))
    change = item["domains"][worst]["difference"]
    return f"{item['difference']:+.4f}{''.join(errors)}{' *' if item['is_clear'] else ''} ({worst} {change:+.3f})"
