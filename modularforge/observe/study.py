"""The table of a study for people: Markdown and a dot plot, written beside the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from checkpoints import paths
from checkpoints.markdown import plain
from checkpoints.redact import redact_values
from modularforge.observe.findings import (
    PROBES,
    difference,
    position_table,
    probe_table,
    probes_in,
    reply_table,
    routing_lines,
)
from modularforge.observe.metrics import DECISIVE, ERROR_RATES, MEASURED
from modularforge.observe.table import (
    Column,
    Table,
    count,
    decimals,
    duration,
    fixed,
    name_column,
    named,
    percent,
    signed,
)

StudyTable = Mapping[str, Any]


def write_table(root: str, table: StudyTable, with_plot: bool = False) -> str:
    """Write `root`.json and .md (and .png); returns the URL of the Markdown."""
    paths.replace_bytes(f"{root}.json", (json.dumps(redact_values(table), indent=1, allow_nan=False) + "\n").encode())
    paths.replace_bytes(f"{root}.md", markdown(table).encode())
    if with_plot and table["rows"]:
        from modularforge.observe.evaluation_figures import draw_study

        paths.replace_bytes(f"{root}.png", draw_study(table))
    return f"{root}.md"


def variant_table(table: StudyTable) -> Table:
    """One variant a record: loss, what is gained, what it costs."""
    columns = [
        name_column("variant"),
        Column("seeds", lambda record: len(record[1]["losses"])),
        Column(DECISIVE.title, named(DECISIVE.column), decimals(DECISIVE.digits)),
        Column("±", named("standard_deviation"), fixed),
        Column("to dense", named("minus_dense"), signed),
        Column("kept", named("kept"), percent),
        Column("worst", named("worst_domain"), lambda worst: f"{worst['domain']} {signed(worst['change'], 3)}"),
        *(
            Column(one.title, named(one.column), decimals(one.digits), on_screen=one.in_table)
            for one in MEASURED
            if one is not DECISIVE and any(one.column in row for row in table["rows"].values())
        ),
        *(
            Column(f"{one.title} %", _in_percent(one.column), decimals(one.digits), on_screen=one.in_table)
            for one in ERROR_RATES
            if any(one.column in row for row in table["rows"].values())
        ),
        Column("total", named("parameters"), count),
        Column("active", named("active_parameters"), count),
        Column("FLOPs/token", named("flops_per_token"), count),
        Column("tokens", named("training_tokens"), count),
        Column("bytes", named("trained_bytes"), count, on_screen=False),
        Column("CPU s", named("processor_seconds"), decimals(0), on_screen=False),
        *([Column("training", named("training_seconds"), duration)] if _is_speech(table) else []),
    ]
    return Table(columns, [*table["rows"].items()])


def markdown(table: StudyTable) -> str:
    """The table as a page."""
    half = "" if _is_speech(table) else "the selection half of "
    where = (
        f"{half}the validation documents, which no variant was fitted to"
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
        *variant_table(table).markdown(),
        *routing_lines(table["rows"]),
    ]
    for found in filter(lambda one: one.records, _tables(table)):
        lines += ["", plain(found.words), "", *found.markdown()]
    if table["calibration"]:
        rejected = [
            f"{plain(name)} ({i['seeds'] - i['kept']} of {i['seeds']})"
            for name, i in table["calibration"].items()
            if i["kept"] < i["seeds"]
        ]
        lines += ["", f"Calibrations that were not kept: {', '.join(rejected) or 'none'}."]
    return "\n".join([*lines, ""])


def _tables(table: StudyTable) -> Iterator[Table]:
    rows, records = table["rows"], [*table["rows"].items()]
    by_domain = (Column(label, _inside("domains", label), decimals(3)) for label in table["domains"])
    yield Table([name_column("variant"), *by_domain], records, words="Loss by domain, mean over seeds:")
    for name, title in (("wer", "Word"), ("cer", "Character")) if _is_speech(table) else ():
        rates = (Column(label, _rate(label, name), decimals(1)) for label in table["domains"])
        words = f"{title} error rate by domain in per cent, mean over seeds:"
        yield Table([name_column("variant"), *rates], records, words=words)
    for task in dict.fromkeys(name for row in rows.values() for name in row.get("tasks", {})):
        yield _task_table(rows, task)
    places = next((list(row["kept_by_position"]) for row in rows.values()), [])
    by_place = (Column(place, _inside("kept_by_position", place), percent) for place in places)
    words = "Share of the oracle's gain that is kept, by position in the window:"
    yield Table([name_column("variant"), *by_place], records if places else [], words=words)
    words = (
        "Loss on other text than the domains' own: the second half of windows whose first half is another domain's "
        "text; documents of passages of different domains; text of no domain:"
    )
    yield probe_table(rows, "variant", "", words)
    yield position_table(rows, "variant", "", "Loss behind a switch of domain, by distance from it:", "switch")
    for other in dict.fromkeys(name for row in rows.values() for name in row["differences"]):
        yield _difference_table(table, other)
    words = "What removing one expert changes in the domains of the others (relative loss):"
    changes = (Column("largest", named("others"), _change), Column("mean", named("others_mean"), _change))
    yield Table([name_column("variant"), *changes], [*table["removal"].items()], words=words)


def _is_speech(table: StudyTable) -> bool:
    return any("rates" in row for row in table["rows"].values())


def _in_percent(name: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: None if name not in record[1] else 100 * record[1][name]


def _rate(label: str, name: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: 100 * record[1]["rates"][label][name] if "rates" in record[1] else None


def _task_table(rows: Mapping[str, Any], task: str) -> Table:
    asked = {name: row["tasks"][task] for name, row in rows.items() if task in row.get("tasks", {})}
    words = f"Replies to the prompts of task {task}, in per cent, mean over seeds:"
    return reply_table(asked, "variant", "", words)


def _inside(group: str, name: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: record[1][group].get(name)


def _change(value: float) -> str:
    return f"{value:+.2%}"


def _difference_table(table: StudyTable, other: str) -> Table:
    found = {name: row["differences"][other] for name, row in table["rows"].items() if other in row["differences"]}
    columns = [Column(PROBES[probe], _difference_on(probe)) for probe in probes_in(found.values())]
    words = (
        f"Less {other}, on the same documents ± the error over documents, ± over seeds where there are more; * is more "
        "than two errors; in brackets the domain that fares worst:"
    )
    return Table([name_column("variant"), *columns], [*found.items()], words=words)


def _difference_on(probe: str) -> Callable[[tuple[str, Any]], Any]:
    return lambda record: difference(record[1].get(probe), with_worst=True)
