"""The report says what was drawn of each source, how often documents were seen, and what was left out."""

import pytest

from modularforge.observe.drawn import MOST_ROWS, drawn_table
from modularforge.observe.page import make_page
from modularforge.observe.run import read_run
from tests.conftest import tiny_config
from tests.synthetic_runs import write_stage

MIXTURE = {"law": {"windows": 75, "share": 0.75, "epochs": 3.0}, "<web>": {"windows": 25, "share": 0.25, "epochs": 0.5}}
SPLITS = {"train": {"law": {"tokens": 600, "documents": 3}, "web": {"tokens": 1000, "documents": 5}}}


def run_of(tmp_path, backbone, expert=None, **corpus):
    url = str(tmp_path / "run")
    config = tiny_config(url, model={"context_length": 16})
    write_stage(url, "data", "corpus", config, splits=SPLITS, **corpus)
    write_stage(url, "backbone", "backbone", config, **backbone)
    write_stage(url, "experts/expert-0", "expert", config, **(expert or {}))
    return read_run(url)


def rows(table):
    assert table is not None
    return [[column.value(record) for column in table.columns] for record in table.records]


def test_each_source_of_each_job_has_a_row_on_the_page(tmp_path):
    run = run_of(
        tmp_path, {"mixture": MIXTURE}, {"mixture": {"law": MIXTURE["law"]}}, near_copies={"dropped": 7, "left": 2}
    )
    table = drawn_table(run)
    assert rows(table) == [
        ["backbone", "<web>", 25, 0.25, 0.5],
        ["backbone", "law", 75, 0.75, 3.0],
        ["expert-0", "law", 75, 0.75, 3.0],
    ]
    page = make_page(run, [])
    assert "What was drawn" in page
    assert "&lt;web&gt;" in page
    assert "3.00 times" in page
    assert "7 training documents were near duplicates of held-out ones and left out; 2 are near duplicates" in page


def test_without_a_mixture_it_says_how_often_the_text_was_read(tmp_path):
    table = drawn_table(run_of(tmp_path, {"training_tokens": 3200}))
    assert table is not None
    assert rows(table) == [["backbone", "all", 200, 1.0, 2.0]]
    assert "each text is drawn once an epoch" in table.words


@pytest.mark.parametrize(
    "facts",
    [{}, {"mixture": 3}, {"mixture": {"law": {"windows": -1, "share": 2, "epochs": 1}}}, {"training_tokens": "many"},
     {"mixture": {"law": {"windows": 1, "share": 1e300, "epochs": 1}}}, {"training_tokens": True}],
    ids=["none", "a number", "negative", "words", "huge", "a truth"],
)  # fmt: skip
def test_odd_facts_are_no_rows(tmp_path, facts):
    assert drawn_table(run_of(tmp_path, facts, near_copies="none")) is None


def test_thousands_of_rows_are_cut(tmp_path):
    mixture = {f"source {number}": MIXTURE["law"] for number in range(MOST_ROWS + 5)}
    table = drawn_table(run_of(tmp_path, {"mixture": mixture}))
    assert table is not None
    assert len(table.records) == MOST_ROWS
    assert table.words.endswith("5 more rows are not shown.")
