"""Tables are records in named columns: one more column, or row, changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from modularforge.observe import evaluation as shown
from modularforge.observe.metrics import DECISIVE, MEASURED, Metric
from modularforge.observe.study import variant_table
from modularforge.observe.table import Column, Table, count, duration, fixed, named, of
from modularforge.study.table import COST, make_table
from tests.synthetic_runs import evaluation

RECORDS = [("a", {"loss": 2.5, "size": 1_500_000_000}), ("b|c", {"loss": None, "size": 999_600})]
COLUMNS = [
    Column("name", lambda record: record[0], is_text=True),
    Column("loss", named("loss"), fixed),
    Column("size", named("size"), count, on_screen=False),
    Column("other", named("absent"), fixed),
]


def test_all_printers_show_the_same_records(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(COLUMNS, RECORDS)
    assert table.rows == [["a", "2.5000", "1.5B", "–"], ["b|c", "–", "1M", "–"]]
    assert table.markdown()[1:3] == ["| --- | ---: | ---: | ---: |", "| a | 2.5000 | 1.5B | – |"]
    assert table.markdown()[3].startswith("| b\\|c |")
    assert table.text() == [
        "  name    loss  size  other",
        "  a     2.5000  1.5B      –",
        "  b|c        –    1M      –",
    ]
    table.show(marked=0)
    out = capsys.readouterr().out
    assert "2.5000" in out
    assert "1.5B" not in out, "no room on a screen"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"), (999_500, "1M"), (1_500_000_000, "1.5B"),
     (10**12, "1T"), (5 * 10**14, "500T")],
)  # fmt: skip
def test_counts_have_three_digits_and_one_set_of_units(value: int, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (420, "7 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_attributes_on_the_way_may_be_missing() -> None:
    assert of("real")(("a", 3)) == 3
    assert of("real", "imag")(("a", 3)) == 0
    assert of("real")(("a", None)) is None


def bold_rows(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model that the printed table marks as the best."""
    marked: list[str] = []

    def show(table: Table, place: int | None) -> None:
        assert place is not None
        marked.append(table.rows[place][0])

    monkeypatch.setattr(Table, "show", show)
    shown.print_table(results)
    return marked


@pytest.mark.parametrize("place", [0, 1, len(MEASURED)])
def test_one_more_metric_is_one_more_column_and_the_best_model_stays_the_best(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = evaluation(2)
    for number, row in enumerate(results["models"].values()):
        row["accuracy"] = 1 - number / 10  # the other way round than the losses
    before = shown.model_table(results)
    new = Metric("accuracy", "accuracy", "", better="higher", digits=1)
    monkeypatch.setattr("modularforge.observe.metrics.MEASURED", (*MEASURED[:place], new, *MEASURED[place:]))
    after = shown.model_table(results)
    assert [title for title in after.header if title != "accuracy"] == before.header
    assert [row[after.header.index("accuracy")] for row in after.rows][:2] == ["1.0", "0.9"]
    assert bold_rows(results, monkeypatch) == ["calibrated"]
    assert "| accuracy |" in shown.markdown(results)


def test_the_metric_that_decides_says_which_direction_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DECISIVE.column == "mean_loss"
    monkeypatch.setattr("modularforge.observe.metrics.DECISIVE", Metric("mean_loss", "score", "", better="higher"))
    assert bold_rows(evaluation(2), monkeypatch) == ["backbone"]


def test_a_study_takes_its_columns_from_the_same_table_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"mean_loss": 2.5, "bits_per_byte": 1.5, "accuracy": 0.9}
    row = {"domains": {"law": {"loss": 2.5}}, "positions": {}, "documents": {}, "probes": {}} | dict.fromkeys(COST, 1)
    about = {"kind": "backbone", "recipe": "r", "tokens": 1}
    results = {"v": [{**about, "seed": seed, "rows": {"": row | known | {"accuracy": seed}}} for seed in (0, 1)]}
    before = variant_table(make_table("s", "test", results, "r"))
    assert before.header[2:4] == ["mean loss", "±"]
    assert before.rows[0][before.header.index("bits/byte")] == "1.5000"
    new = Metric("accuracy", "right answers", "", better="higher", digits=1)
    for room in ("observe.study", "study.table"):
        monkeypatch.setattr(f"modularforge.{room}.MEASURED", (*MEASURED, new))
    after = variant_table(make_table("s", "test", results, "r"))
    assert [title for title in after.header if title != "right answers"] == before.header
    assert after.rows[0][after.header.index("right answers")] == "0.5", "the mean over seeds"


def test_the_oracle_is_a_bound_and_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    results = evaluation(2)
    results["models"]["oracle"] = {**results["models"]["backbone"], "mean_loss": 0.1}
    assert bold_rows(results, monkeypatch) == ["calibrated"]


def test_a_column_of_a_domain_is_found_whatever_its_name() -> None:
    results = evaluation(2, domains=["total", "mean loss", "a_b"])
    results["models"]["backbone"]["domains"]["total"]["perplexity"] = 77.25
    lines = shown.model_table(results).text()
    assert lines[0].split().count("total") == 2
    (row,) = (line for line in lines if line.split()[0] == "backbone")
    assert "77.25" in row, "the domain's perplexity, and not a count of parameters under the same title"
