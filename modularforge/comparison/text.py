"""The comparison as text for people, in fixed columns, the most important first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from modularforge.comparison.anomalies import Anomaly
from modularforge.comparison.comparison import Comparison, JobComparison, MetricComparison, kind_of, without_members
from modularforge.comparison.pairs import Pair
from modularforge.comparison.statistics import CAVEAT
from modularforge.observe.progress import headline

DETAILED_EXPERTS = 4
SHOWN_ANOMALIES = 6
SHOWN_SETTINGS = 30
PLURALS = {"expert": "experts", "branch": "branches"}


def in_short(comparison: Comparison) -> str:
    """The first page: runs, verdict, settings that differ, evaluation, seeds."""
    lines = [*_runs(comparison), *_verdict(comparison), *_settings(comparison), *_evaluation(comparison)]
    return "\n".join([*lines, *_seeds(comparison)])


def as_text(comparison: Comparison) -> str:
    """The whole report."""
    lines = [in_short(comparison)]
    names = _detailed(comparison)
    for name in names:
        lines += _job(comparison, comparison.jobs[name])
    if len(names) < len(comparison.jobs):
        lines += _members(comparison, [name for name in comparison.jobs if name not in names])
    return "\n".join([*lines, "", "About the tests", f"  {CAVEAT}", ""])


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  " + "  ".join(cell.rjust(width) if column else cell.ljust(width)
                         for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip


def number(value: float | None) -> str:
    """Five significant digits, or a dash."""
    return "–" if value is None else f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.4e}"


def _runs(comparison: Comparison) -> list[str]:
    lines = ["Runs (the first is the reference)"]
    lines += table(["run", "state"], ([name, headline(run)] for name, run in comparison.runs.items()))
    lines += [f"  {name}: {problem}" for name, run in comparison.runs.items() for problem in run.problems]
    return lines


def _verdict(comparison: Comparison) -> list[str]:
    """Where the losses stand, in one line per run and job."""
    lines = ["", "In short"]
    if comparison.are_equal:
        return [*lines, "  The runs differ nowhere: all losses agree to the last bit."]
    for job in comparison.jobs.values():
        if job.name in _detailed(comparison):
            lines += [f"  {sentence}" for sentence in _sentences(comparison, job)]
            lines += [f"  {sentence}" for sentence in _warnings(job)]
    return lines


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
    column = next((name for name in ("validation_perplexity", "validation_loss", "loss") if name in job.metrics), None)
    if column is None:
        return
    metric = job.metrics[column]
    for name, pair in metric.pairs.items():
        what = f"{job.name}, {metric.metric.title}, {name}"
        if not pair.common_steps:
            yield f"{what}: no step in common with {comparison.reference}"
        elif pair.is_equal:
            yield f"{what}: the same at all {pair.common_steps} common steps"
        else:
            parting = pair.parting(comparison.band)
            parts = f"parts at step {parting.step} (ratio {parting.ratio:.2f})" if parting else "does not part"
            yield f"{what}: {parts}; ratio {number(pair.final_ratio)} at step {pair.last_step}"


def _settings(comparison: Comparison) -> list[str]:
    rows = [[setting, *values.values()] for setting, values in comparison.settings.items()]
    if not rows:
        return ["", "Settings", "  the same, or not known"]
    more = [f"  and {len(rows) - SHOWN_SETTINGS} more"] if len(rows) > SHOWN_SETTINGS else []
    shown = [[cell if len(cell) <= 40 else cell[:39] + "…" for cell in row] for row in rows[:SHOWN_SETTINGS]]
    return ["", "Settings that differ", *table(["setting", *comparison.runs], shown), *more]


def _evaluation(comparison: Comparison) -> list[str]:
    if not comparison.evaluation:
        return []
    rows = (
        [model, *(number(values.get(name)) for name in comparison.runs)]
        for model, values in comparison.evaluation.items()
    )
    return ["", "Test perplexity", *table(["model", *comparison.runs], rows)]


def _seeds(comparison: Comparison) -> list[str]:
    if comparison.seeds is None:
        return []
    groups = comparison.seeds.groups
    lines = ["", "Final validation loss over seeds"]
    lines += [f"  {group}: {', '.join(names)}" for group, names in groups.items()]
    rows = []
    for one in comparison.seeds.results:
        if one.job in _detailed(comparison):
            values = map(number, (one.mean, one.standard_deviation, one.difference))
            rows.append([one.job, one.group, str(len(one.losses)), *values, _interval(one.interval)])
    return lines + table(["job", "group", "seeds", "mean", "deviation", "difference", "95 % interval (Welch)"], rows)


def _job(comparison: Comparison, job: JobComparison) -> list[str]:
    lines = ["", f"== {job.name} =="]
    for metric in job.metrics.values():
        lines += _metric(comparison, metric)
    if job.overfitting:
        lines += ["", "overfitting (validation minus training loss, nats)"]
        reference = job.overfitting.get(comparison.reference)
        header = ["run", "first gap", "final gap", "against reference", "best step", "rise since", "overfits"]
        lines += table(
            header,
            (
                [name, number(one.first_gap), number(one.final_gap),
                 number(one.final_gap - reference.final_gap) if reference and one is not reference else "–",
                 str(one.best_step), number(one.rise), "yes" if one.is_overfitting else "no"]
                for name, one in job.overfitting.items()
            ),
        )  # fmt: skip
    return lines


def _metric(comparison: Comparison, one: MetricComparison) -> list[str]:
    lines = ["", one.metric.title + (f" ({_unit(one)})" if _unit(one) else "")]
    header = ["run", "points", "first", "final", "best", "at step", "mean", "deviation", "cv %", "improved %", "end"]
    lines += table(header, (_summary(one, name) for name in one.summaries))
    lines += [f"  {name}: not logged" for name in one.missing]
    if one.pairs:
        lines += table(
            ["against " + comparison.reference, "steps", "mean difference", "95 % interval", "final ratio",
             f"parts (x{comparison.band:g})", "for good", "paired t", "p", "Welch p", "Cohen d"],
            (_pair(name, pair, comparison.band) for name, pair in one.pairs.items()),
        )  # fmt: skip
    lines += [f"  {name}: {_anomalies(found)}" for name, found in one.anomalies.items() if found]
    return lines


def _unit(one: MetricComparison) -> str:
    """The stored unit: the text shows values as they are logged."""
    return {"learning_rate": "", "tokens_per_second": "tokens per second", "data_wait_share": "share of the time",
            "peak_memory_bytes": "bytes"}.get(one.metric.column, one.metric.unit)  # fmt: skip


def _summary(one: MetricComparison, name: str) -> list[str]:
    summary, end = one.summaries[name], one.convergence.get(name)
    improved = "–" if summary.improvement is None else f"{100 * summary.improvement:.1f}"
    values = [summary.mean, summary.standard_deviation]
    return [
        name, str(summary.count), number(summary.first), number(summary.final), number(summary.best),
        str(summary.best_step), *map(number, values), f"{100 * summary.coefficient_of_variation:.1f}", improved,
        f"{end.state} {100 * end.change:+.1f} %" if end else "–",
    ]  # fmt: skip


def _pair(name: str, pair: Pair, band: float) -> list[str]:
    parting = pair.parting(band)
    test, welch = pair.paired_t_test, pair.welch_t_test
    return [
        name, str(pair.common_steps), number(pair.mean_difference), _interval(pair.interval), number(pair.final_ratio),
        str(parting.step) if parting else "no",
        str(parting.for_good_from) if parting and parting.for_good_from is not None else "no",
        number(test.statistic) if test else "–", f"{test.p:.2g}" if test else "–",
        f"{welch.p:.2g}" if welch else "–", number(pair.cohens_d),
    ]  # fmt: skip


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{number(interval[0])} … {number(interval[1])}"


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
    return ["", f"Final validation loss of single {' and '.join(words)}", *table(header, rows)]
