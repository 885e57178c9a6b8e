"""Compare runs by URL and write the report: `compare.txt`, `compare.json` and `plots/*.png`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from checkpoints import paths
from checkpoints.redact import redact, redact_values
from checkpoints.screen import literal
from modularforge.comparison.comparison import Comparison, JobComparison, MetricComparison, compare
from modularforge.comparison.figures import draw_comparison
from modularforge.comparison.statistics import CAVEAT
from modularforge.comparison.text import as_text, in_short
from modularforge.errors import ConfigError
from modularforge.log import json_safe
from modularforge.observe.discover import short_names
from modularforge.observe.progress import headline
from modularforge.observe.run import read_run

DEFAULT_FOLDER = "runs/comparisons"


def compare_runs(urls: list[str], output: str | None = None, band: float = 2.0) -> str:
    """Write the comparison; return its first page and where the rest lies. The first run is the reference."""
    if len(set(urls)) < 2:
        raise ConfigError(f"compare must be given two different runs or more, but got {', '.join(urls)}; name another")
    names = short_names(list(dict.fromkeys(urls)))
    comparison = compare({name: read_run(url) for url, name in names.items()}, band)
    target = output or paths.join(DEFAULT_FOLDER, "-and-".join(map(_folder, names.values()))[:120])
    for name, content in draw_comparison(comparison):
        paths.replace_bytes(paths.join(target, "plots", f"{name}.png"), content)
    paths.replace_bytes(paths.join(target, "compare.json"), as_json(comparison))
    paths.replace_bytes(paths.join(target, "compare.txt"), literal(redact(as_text(comparison))).encode())
    where = (
        f"every statistic: {paths.join(target, 'compare.txt')} and compare.json; plots: {paths.join(target, 'plots')}"
    )
    return f"{in_short(comparison)}\n\n{where}"


def _folder(name: str) -> str:
    """A run's name as a part of a folder's."""
    return literal(name.replace("/", "-"), keep="")


def as_json(comparison: Comparison) -> bytes:
    """All numbers of the comparison; schema in docs/observing.md."""
    values = {
        "reference": comparison.reference,
        "band": comparison.band,
        "are_equal": comparison.are_equal,
        "caveat": CAVEAT,
        "runs": {name: {"url": run.url, "state": headline(run)} for name, run in comparison.runs.items()},
        "settings": comparison.settings,
        "test_perplexity": comparison.evaluation,
        "seeds": asdict(comparison.seeds) if comparison.seeds else None,
        "jobs": {name: _job(job) for name, job in comparison.jobs.items()},
    }
    return (json.dumps(json_safe(redact_values(values)), indent=1, allow_nan=False) + "\n").encode()


def _job(job: JobComparison) -> dict[str, Any]:
    return {
        "metrics": {column: _metric(one) for column, one in job.metrics.items()},
        "overfitting": {name: asdict(found) for name, found in job.overfitting.items()},
    }


def _metric(one: MetricComparison) -> dict[str, Any]:
    return {
        "missing": one.missing,
        "summaries": {name: asdict(summary) for name, summary in one.summaries.items()},
        "convergence": {name: asdict(state) for name, state in one.convergence.items()},
        "anomalies": {name: [asdict(anomaly) for anomaly in found] for name, found in one.anomalies.items()},
        "pairs": {name: {**asdict(pair), "is_equal": pair.is_equal} for name, pair in one.pairs.items()},
    }
