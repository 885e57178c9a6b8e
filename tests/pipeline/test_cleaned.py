"""The stage `cleaned`: prepared data are of what it left, it is made once, and the report shows what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data import cleaning
from modularforge.errors import DataError
from modularforge.observe.cleaning import parse_cleaning
from modularforge.observe.page import make_page
from modularforge.observe.run import read_run
from modularforge.pipeline import STAGES, stage_settings
from modularforge.run import Run
from tests.conftest import tiny_values
from tests.unit.test_cleaning import PLAIN, config_of, prose

BAD = "<b>Too</b> short."


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(cleaning, "cores", lambda: 1)
    texts = {**PLAIN, "train": [*PLAIN["train"], PLAIN["train"][0], BAD, *map(prose, range(100, 104))]}
    steps = {"step": "length", "options": {"min_words": 5}}, {"step": "exact"}
    data = config_of(tmp_path, {"novels": texts}, *steps).data.model_dump() | {"vocab_size": 300}
    return make_config(tiny_values(tmp_path / "run", data=data), "tests")


def test_prepared_data_are_of_what_cleaning_left(config: Config, tmp_path: Path) -> None:
    run = Run(config)
    cleaned = run.make("clean")
    corpus = run.make("prepare-data")
    assert corpus.manifest.inputs.keys() == {"cleaned"}
    metadata = json.loads((tmp_path / "run/data/metadata.json").read_text())
    counts = {split: found["novels"]["documents"] for split, found in metadata["splits"].items()}
    assert counts == {"train": 10, "validation": 1, "test": 1}
    again = Run(config.model_copy(update={"data": config.data.model_copy(update={"vocab_size": 280})}))
    assert again.make("clean").manifest.created == cleaned.manifest.created
    assert not list((tmp_path / "run").glob("*.partial"))


def test_the_report_shows_what_was_dropped_and_why(config: Config, tmp_path: Path) -> None:
    Run(config).make("clean")
    run = read_run(str(tmp_path / "run"))
    page = make_page(run, [])
    assert run.problems == []
    assert '<section id="cleaning">' in page
    assert "<td>1 length</td><td>novels</td><td>too short 1</td><td class=n>14</td><td class=n>1</td>" in page
    assert "dropped: too short: &lt;b&gt;Too&lt;/b&gt; short." in page
    with pytest.raises(DataError, match=r"cleaning.json must say what cleaning did, but cannot be read"):
        parse_cleaning(b'{"counts": 5}', "cleaning.json")


def test_texts_of_the_report_name_their_domain_where_the_source_has_labels(config: Config, tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        path = tmp_path / f"novels.{name}.jsonl"
        rows = [json.loads(line) | {"topic": "sea"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = config.data.sources[0].model_copy(update={"label_field": "topic"})
    labelled = config.model_copy(update={"data": config.data.model_copy(update={"sources": [source]})})
    Run(labelled).make("clean")
    page = make_page(read_run(str(tmp_path / "run")), [])
    assert "<b>length</b>, novels (sea), dropped: too short: &lt;b&gt;Too&lt;/b&gt; short." in page


def test_a_run_without_cleaning_has_no_such_stage(tmp_path: Path) -> None:
    config = make_config(tiny_values(tmp_path), "tests")
    assert not STAGES["clean"].is_wanted(config)
    assert "data.clean" not in stage_settings(config, "prepare-data")
