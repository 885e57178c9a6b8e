"""Compare runs by URL and write the report: `compare.txt` for people, `compare.json`, and `plots/*.png`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from checkpoints import paths
from checkpoints.redact import redact, redact_values
from checkpoints.screen import literal
from checkpoints.urls import safe_part
from modularforge.errors import ConfigError
from modularforge.log import json_safe
from modularforge.observe.anomalies import Anomaly, Convergence, Overfitting
from modularforge.observe.canvas import house_style, png_bytes
from modularforge.observe.comparison import Comparison, JobComparison, MetricComparison, compare
from modularforge.observe.completion import headline
from modularforge.observe.curves import MOST_PANELS, draw_comparison
from modularforge.observe.discover import short_names
from modularforge.observe.divergence import CAVEAT, Pair
from modularforge.observe.gradient_figures import norm_figures, norms_of_jobs
from modularforge.observe.metrics import Metric, measured
from modularforge.observe.run import kind_of, read_run, without_members
from modularforge.observe.table import Column, Table, listing, name_column, number, of

DEFAULT_FOLDER = "runs/comparisons"
# What a page has room for; all of it is in compare.json.
DETAILED_EXPERTS = 4
SHOWN_ANOMALIES = 6
SHOWN_SETTINGS = 30
BY_TOKEN = ("mean_loss", "perplexity")
"""Metrics that compare only where a token is the same text."""
OTHER_TOKENS = (
    "  The runs have different tokenizers: a token is not the same text, so losses, perplexities and their differences",
    "  say nothing about which run is better. Bits per byte of the same test text do.",
)
PLURALS = {"expert": "experts", "branch": "branches"}


def compare_runs(urls: list[str], output: str | None = None, band: float = 2.0) -> str:
    """Write the comparison; return its first page and where the rest lies. The first run is the reference."""
    if len(set(urls)) < 2:
        raise ConfigError(f"compare must be given two different runs or more, but got {', '.join(urls)}; name another")
    names = short_names(list(dict.fromkeys(urls)))
    comparison = compare({name: read_run(url) for url, name in names.items()}, band)
    target = output or paths.join(DEFAULT_FOLDER, "-and-".join(map(_folder, names.values()))[:120])
    for name, content in chain(draw_comparison(comparison), draw_norms(comparison)):
        paths.replace_bytes(paths.join(target, "plots", f"{name}.png"), content)
    paths.replace_bytes(paths.join(target, "compare.json"), as_json(comparison))
    paths.replace_bytes(paths.join(target, "compare.txt"), literal(redact(as_text(comparison))).encode())
    where = (
        f"every statistic: {paths.join(target, 'compare.txt')} and compare.json; plots: {paths.join(target, 'plots')}"
    )
    return f"{in_short(comparison)}\n\n{where}"


def draw_norms(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """File names without ending, and PNG bytes: norms of the gradients of each job that several runs measured."""
    found = {name: norms_of_jobs(run.norms) for name, run in comparison.runs.items()}
    with house_style():
        for job in dict.fromkeys(job for norms in found.values() for job in norms):
            panels = {name: norms[job] for name, norms in found.items() if job in norms}
            for name, figure in norm_figures(dict(list(panels.items())[:MOST_PANELS])) if len(panels) > 1 else ():
                yield safe_part(f"{name}_{job.replace(' ', '-')}"), png_bytes(figure, cut=False)


def _folder(name: str) -> str:
    """A run's name as a part of a folder's."""
    return literal(name.replace("/", "-"), keep="")


def as_json(comparison: Comparison) -> bytes:
    """All numbers of the comparison; schema in docs/observing.md."""
    values = {
        "reference": comparison.reference,
        "band": comparison.band,
        "are_equal": comparison.are_equal,
        "have_one_tokenizer": comparison.have_one_tokenizer,
        "caveat": CAVEAT,
        "runs": {name: {"url": run.url, "state": headline(run)} for name, run in comparison.runs.items()},
        "settings": comparison.settings,
        "test_perplexity": comparison.evaluation.get("perplexity", {}),
        "evaluation": comparison.evaluation,
        "seeds": asdict(comparison.seeds) if comparison.seeds else None,
        "jobs": {name: _job_values(job) for name, job in comparison.jobs.items()},
    }
    return (json.dumps(json_safe(redact_values(values)), indent=1, allow_nan=False) + "\n").encode()


def _job_values(job: JobComparison) -> dict[str, Any]:
    return {
        "metrics": {column: _metric_values(one) for column, one in job.metrics.items()},
        "overfitting": {name: asdict(found) for name, found in job.overfitting.items()},
    }


def _metric_values(one: MetricComparison) -> dict[str, Any]:
    return {
        "missing": one.missing,
        "summaries": {name: asdict(summary) for name, summary in one.summaries.items()},
        "convergence": {name: asdict(state) for name, state in one.convergence.items()},
        "anomalies": {name: [asdict(anomaly) for anomaly in found] for name, found in one.anomalies.items()},
        "pairs": {name: {**asdict(pair), "is_equal": pair.is_equal} for name, pair in one.pairs.items()},
    }


def in_short(comparison: Comparison) -> str:
    """The first page: runs, verdict, settings that differ, evaluation, seeds."""
    parts = [_verdict(comparison), _settings(comparison), _evaluation(comparison)]
    if not (_has_common_steps(comparison) and comparison.have_one_tokenizer):  # what can be said comes first
        parts.reverse()
    return "\n".join([*_runs(comparison), *(line for part in parts for line in part), *_seeds(comparison)])


def _has_common_steps(comparison: Comparison) -> bool:
    """Whether the losses that the verdict speaks of can be laid beside each other; a step of another is no verdict."""
    losses = [_loss_of(comparison.jobs[name]) for name in _detailed(comparison)]
    pairs = [pair for metric in losses if metric for pair in metric.pairs.values()]
    return comparison.are_equal or any(pair.common_steps for pair in pairs)


def as_text(comparison: Comparison) -> str:
    """The whole report."""
    lines = [in_short(comparison)]
    names = _detailed(comparison)
    for name in names:
        lines += _job(comparison, comparison.jobs[name])
    if len(names) < len(comparison.jobs):
        lines += _members(comparison, [name for name in comparison.jobs if name not in names])
    return "\n".join([*lines, "", "About the tests", f"  {CAVEAT}", ""])


def _runs(comparison: Comparison) -> list[str]:
    lines = ["Runs (the first is the reference)"]
    lines += listing(["run", "state"], [[name, headline(run)] for name, run in comparison.runs.items()]).text()
    lines += [f"  {name}: {problem}" for name, run in comparison.runs.items() for problem in run.problems]
    return lines


def _verdict(comparison: Comparison) -> list[str]:
    """Where the losses stand, in one line per run and job."""
    lines = ["", "In short"]
    if comparison.are_equal:
        return [*lines, "  The runs differ nowhere: all losses agree to the last bit."]
    if not comparison.have_one_tokenizer:
        return [*lines, *OTHER_TOKENS, *(f"  {text}" for job in _shown_jobs(comparison) for text in _warnings(job))]
    for job in _shown_jobs(comparison):
        lines += [f"  {sentence}" for sentence in _sentences(comparison, job)]
        lines += [f"  {sentence}" for sentence in _warnings(job)]
    apart = ", ".join(f"{job} of {name}" for job, name in _apart(comparison))
    return [*lines, *([f"  no step in common with {comparison.reference}: {apart}"] if apart else [])]


def _shown_jobs(comparison: Comparison) -> list[JobComparison]:
    return [comparison.jobs[name] for name in _detailed(comparison)]


def _apart(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Jobs whose losses cannot be laid beside the reference's, and in which run."""
    for name in _detailed(comparison):
        metric = _loss_of(comparison.jobs[name])
        pairs = metric.pairs.items() if metric else ()
        yield from ((name, run) for run, pair in pairs if not pair.common_steps)


def _loss_of(job: JobComparison) -> MetricComparison | None:
    column = next((name for name in ("validation_perplexity", "validation_loss", "loss") if name in job.metrics), None)
    return job.metrics[column] if column else None


def _warnings(job: JobComparison) -> Iterator[str]:
    """What looks wrong in the losses of a job."""
    for column in ("loss", "validation_loss"):
        for name, found in job.metrics[column].anomalies.items() if column in job.metrics else ():
            sudden = [one for one in found if one.kind != "plateau"]
            if sudden:
                yield f"{job.name}, {job.metrics[column].metric.title}, {name}: {_anomalies(sudden)}"
    for name, one in job.overfitting.items():
        if one.is_overfitting:
            yield f"{job.name}, {name}: overfits, validation rose by {number(one.rise)} nats since step {one.best_step}"


def _sentences(comparison: Comparison, job: JobComparison) -> Iterator[str]:
    metric = _loss_of(job)
    for name, pair in metric.pairs.items() if metric else ():
        what = f"{job.name}, {metric.metric.title}, {name}" if metric else ""
        if not pair.common_steps:
            continue
        if pair.is_equal:
            yield f"{what}: the same at all {pair.common_steps} common steps"
        else:
            divergence = pair.divergence(comparison.band)
            where = f"diverges at step {divergence.step} (ratio {divergence.ratio:.2f})" if divergence else ""
            end = f"ratio {number(pair.final_ratio)} at step {pair.last_step}"
            yield f"{what}: {where or 'does not diverge'}; {end}"


def _settings(comparison: Comparison) -> list[str]:
    rows = [[setting, *values.values()] for setting, values in comparison.settings.items()]
    if not rows:
        return ["", "Settings", "  the same, or not known"]
    more = [f"  and {len(rows) - SHOWN_SETTINGS} more"] if len(rows) > SHOWN_SETTINGS else []
    shown = [[cell if len(cell) <= 40 else cell[:39] + "…" for cell in row] for row in rows[:SHOWN_SETTINGS]]
    return ["", "Settings that differ", *listing(["setting", *comparison.runs], shown).text(), *more]


def _evaluation(comparison: Comparison) -> list[str]:
    lines = []
    found_in = dict.fromkeys(metric for run in comparison.runs.values() for metric in measured(run.evaluation or {}))
    metrics = list(found_in)
    if not comparison.have_one_tokenizer:
        metrics.sort(key=lambda metric: metric.column in BY_TOKEN)
    for metric in metrics if comparison.evaluation else ():
        found = comparison.evaluation[metric.column]
        rows = [[model, *_shown(metric, values, comparison)] for model, values in found.items()]
        is_alone = metric.column in BY_TOKEN and not comparison.have_one_tokenizer
        note = ", each by tokens of its own, not comparable" if is_alone else ""
        lines += ["", f"Test: {metric.axis}{note}", *listing(["model", *comparison.runs], rows).text()]
    return lines


def _shown(metric: Metric, values: Mapping[str, float], comparison: Comparison) -> Iterator[str]:
    """A model's value in each run, in the shown unit."""
    for run in comparison.runs:
        yield number(values[run] * metric.factor if run in values else None)


def _seeds(comparison: Comparison) -> list[str]:
    if comparison.seeds is None:
        return []
    groups = comparison.seeds.groups
    lines = ["", "Final validation loss over seeds"]
    lines += [f"  {group}: {', '.join(names)}" for group, names in groups.items()]
    columns = [
        name_column("job"),
        Column("group", of("group")),
        Column("seeds", of("losses"), lambda losses: str(len(losses))),
        Column("mean", of("mean"), number),
        Column("deviation", of("standard_deviation"), number),
        Column("difference", of("difference"), number),
        Column("95 % interval (Welch)", of("interval"), _interval),
    ]
    shown = [(one.job, one) for one in comparison.seeds.results if one.job in _detailed(comparison)]
    return lines + Table(columns, shown).text()


def _job(comparison: Comparison, job: JobComparison) -> list[str]:
    lines = ["", f"== {job.name} =="]
    for metric in job.metrics.values():
        lines += _metric(comparison, metric)
    if job.overfitting:
        lines += ["", "overfitting (validation minus training loss, nats)"]
        lines += _overfitting_table(comparison, job).text()
    return lines


def _overfitting_table(comparison: Comparison, job: JobComparison) -> Table:
    reference = job.overfitting.get(comparison.reference)

    def against(record: tuple[str, Overfitting]) -> float | None:
        return None if reference is None or record[1] is reference else record[1].final_gap - reference.final_gap

    columns = [
        name_column("run"),
        Column("first gap", of("first_gap"), number),
        Column("final gap", of("final_gap"), number),
        Column("against reference", against, number),
        Column("best step", of("best_step")),
        Column("rise since", of("rise"), number),
        Column("overfits", of("is_overfitting"), lambda overfits: "yes" if overfits else "no"),
    ]
    return Table(columns, [*job.overfitting.items()])


def _metric(comparison: Comparison, one: MetricComparison) -> list[str]:
    unit = one.metric.unit if one.metric.logged is None else one.metric.logged  # values are shown as they are logged
    lines = ["", one.metric.title + (f" ({unit})" if unit else ""), *_summary_table(one).text()]
    lines += [f"  {name}: not logged" for name in one.missing]
    if one.pairs:
        lines += _pair_table(comparison, one).text()
    lines += [f"  {name}: {_anomalies(found)}" for name, found in one.anomalies.items() if found]
    return lines


def _summary_table(one: MetricComparison) -> Table:
    """What each run's curve did."""
    columns = [
        name_column("run"),
        Column("points", of("count")),
        Column("first", of("first"), number),
        Column("final", of("final"), number),
        Column("best", of("best"), number),
        Column("at step", of("best_step")),
        Column("mean", of("mean"), number),
        Column("deviation", of("standard_deviation"), number),
        Column("cv %", of("coefficient_of_variation"), _hundredths),
        Column("improved %", of("improvement"), _hundredths),
        Column("end", lambda record: one.convergence.get(record[0]), _end),
    ]
    return Table(columns, [*one.summaries.items()])


def _end(found: Convergence) -> str:
    return f"{found.state} {100 * found.change:+.1f} %"


def _hundredths(share: float) -> str:
    return f"{100 * share:.1f}"


def _pair_table(comparison: Comparison, one: MetricComparison) -> Table:
    """Each run against the reference."""

    def divergence(name: str) -> Callable[[tuple[str, Pair]], Any]:
        def found(record: tuple[str, Pair]) -> Any:
            step = getattr(record[1].divergence(comparison.band), name, None)
            return "no" if step is None else step

        return found

    columns = [
        name_column("against " + comparison.reference),
        Column("steps", of("common_steps")),
        Column("mean difference", of("mean_difference"), number),
        Column("95 % interval", of("interval"), _interval),
        Column("final ratio", of("final_ratio"), number),
        Column(f"diverges (x{comparison.band:g})", divergence("step")),
        Column("for good", divergence("for_good_from")),
        Column("paired t", of("paired_t_test", "statistic"), number),
        Column("p", of("paired_t_test", "p"), _p_value),
        Column("Welch p", of("welch_t_test", "p"), _p_value),
        Column("Cohen d", of("cohens_d"), number),
    ]
    return Table(columns, [*one.pairs.items()])


def _p_value(value: float) -> str:
    return f"{value:.2g}"


def _interval(interval: tuple[float, float]) -> str:
    return f"{number(interval[0])} … {number(interval[1])}"


def _anomalies(found: list[Anomaly]) -> str:
    words = [
        f"{one.kind} at step {one.first}" + (f"–{one.last}" if one.last != one.first else "")
        + (f" (z {one.score:+.1f})" if one.kind in ("spike", "jump") else "")
        for one in found[:SHOWN_ANOMALIES]
    ]  # fmt: skip
    more = f" and {len(found) - SHOWN_ANOMALIES} more" if len(found) > SHOWN_ANOMALIES else ""
    return ", ".join(words) + more


def _detailed(comparison: Comparison) -> list[str]:
    """Jobs that are written out: all, or without the single experts or branches where they are many."""
    return without_members(comparison.jobs, DETAILED_EXPERTS)


def _members(comparison: Comparison, names: list[str]) -> list[str]:
    """One line for each expert and branch: final validation losses and the difference; all else is in the JSON."""
    rows = []
    for name in names:
        one = comparison.jobs[name].metrics.get("validation_loss")
        if one is not None:
            finals = [number(one.summaries[run].final) if run in one.summaries else "–" for run in comparison.runs]
            rows.append([name, *finals, *(number(pair.final_difference) for pair in one.pairs.values())])
    others = [f"{name} - reference" for name in list(comparison.runs)[1:]]
    if any(len(row) != 1 + len(comparison.runs) + len(others) for row in rows):
        rows, others = [row[: 1 + len(comparison.runs)] for row in rows], []
    words = [word for kind, word in PLURALS.items() if any(kind_of(name) == kind for name in names)]
    header = ["job", *comparison.runs, *others]
    return ["", f"Final validation loss of single {' and '.join(words)}", *listing(header, rows).text()]
