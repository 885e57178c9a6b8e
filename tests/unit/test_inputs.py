"""Sources that change, files named twice: what `prepare-data` says of them, and that it changes no identity."""

import json
import os

import pytest

from checkpoints import open_artifact
from modularforge.config import CleanStepConfig
from modularforge.config_files import make_config
from modularforge.data import cleaning, shards
from modularforge.data.files import find_files
from modularforge.data.inputs import file_states, list_matches, record, warn_of_repeats
from modularforge.errors import DataError
from modularforge.pipeline import contents
from modularforge.run import Run
from modularforge.stages import prepare
from tests.conftest import prepare_data


def write(path, count, word="otter"):
    lines = (json.dumps({"text": f"The {word} {n} waits near the bend of the river. " * 3}) for n in range(count))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def config(tmp_path):
    sources = [
        {"name": "sea", **{split: write(tmp_path / f"sea-{split}.jsonl", 8) for split in ("validation", "test")}},
        {"name": "web", "train": "sample:law/validation.jsonl.gz", "validation": "sample:law/test.jsonl.gz"},
    ]
    sources[0]["train"] = str(tmp_path / "train" / "*.jsonl")
    (tmp_path / "train").mkdir()
    for name in "ab":
        write(tmp_path / "train" / f"{name}.jsonl", 20, name)
    data = {"sources": sources, "vocab_size": 300, "heldout_fraction": 0.2}
    values = {"name": "x", "output_dir": str(tmp_path / "run"), "data": data, "partition": {"method": "random"}}
    return make_config({**values, "experts": {"count": 2}, "model": {"context_length": 16}}, "test")


def warnings(caplog, config):
    caplog.clear()
    prepare_data(config)
    return [entry.message for entry in caplog.records if entry.levelname == "WARNING"]


def test_sources_that_changed_are_named_and_the_data_stays(config, tmp_path, caplog):
    prepare_data(config)
    before = contents(open_artifact(config.data_url))
    assert warnings(caplog, config) == []
    write(tmp_path / "train" / "a.jsonl", 10, "a")
    (tmp_path / "train" / "b.jsonl").unlink()
    write(tmp_path / "train" / "c.jsonl", 5)
    os.utime(tmp_path / "sea-test.jsonl", (1e9, 1e9))
    (told,) = warnings(caplog, config)
    for what in (r"a.jsonl had ", "b.jsonl is gone", "c.jsonl is new", "(and 1 more)", "delete it, or name another"):
        assert what in told
    assert contents(open_artifact(config.data_url)) == before


def test_a_file_written_again_with_the_same_size_is_told(config, tmp_path, caplog):
    prepare_data(config)
    os.utime(tmp_path / "sea-test.jsonl", (1e9, 1e9))
    (told,) = warnings(caplog, config)
    assert "sea-test.jsonl was written again" in told


def test_a_file_that_is_gone_does_not_hide_what_else_changed(config, tmp_path, caplog):
    prepare_data(config)
    (tmp_path / "sea-test.jsonl").unlink()
    (tmp_path / "train" / "b.jsonl").unlink()
    (told,) = warnings(caplog, config)
    assert "sea-test.jsonl is gone" in told
    assert "b.jsonl is gone" in told


def test_sources_that_are_gone_altogether_are_told_and_the_data_is_used(config, tmp_path, caplog):
    prepare_data(config)
    for name in "ab":
        (tmp_path / "train" / f"{name}.jsonl").unlink()
    (told,) = warnings(caplog, config)
    assert "must match files of the corpus, but matches none" in told


def test_data_prepared_before_files_were_recorded_is_used_as_ever(config, caplog, monkeypatch):
    monkeypatch.setattr(prepare, "SOURCES_FACT", "another_name")
    prepare_data(config)
    monkeypatch.undo()
    assert warnings(caplog, config) == []


@pytest.mark.parametrize("recorded", [[], "x", {"files": {"a": 5}, "count": 1}, {"files": [], "count": None}])
def test_a_record_that_nobody_wrote_is_told(config, caplog, recorded, monkeypatch):
    monkeypatch.setattr(prepare, "record", lambda *_: recorded)
    prepare_data(config)
    assert all("cannot be read" in told for told in warnings(caplog, config))


def test_what_is_recorded_holds_no_secret_and_no_file_of_the_package(config):
    matches = list_matches(config)
    recorded = record(matches, file_states(matches))
    assert recorded["count"] == len(recorded["files"]) == 4
    assert all("sample" not in name for name in recorded["files"])
    url = "s3://key:hunter22@bucket/a.jsonl?token=hunter22"
    hidden = record([type(matches[0])("sea", "train", url, False)], {url: [1, "x"]})
    assert "hunter22" not in json.dumps(hidden)


def test_files_in_two_places_are_told_once_each(config, tmp_path, caplog):
    values = config.model_dump(mode="json")
    first = values["data"]["sources"][0]
    first["train"] = [first["train"], str(tmp_path / "train" / "a.jsonl")]
    first["test"] = first["validation"]
    values["data"]["sources"][1] |= {"train": str(tmp_path / "train" / "b.jsonl"), "validation": None}
    again = make_config(values, "test")
    warn_of_repeats(list_matches(again))
    told = caplog.text
    assert "a.jsonl is named 2 times in train of sea; a split reads it once" in told
    assert "sea-validation.jsonl is in validation of sea, test of sea" in told
    assert "b.jsonl is in train of sea, train of web" in told
    assert len(find_files(first["train"])) == 2


def test_what_a_preparation_left_that_was_killed_right_after_its_commit_is_removed(config, tmp_path):
    prepare_data(config)
    left = tmp_path / "run" / "data.partial" / "prepare-0"
    left.mkdir(parents=True)
    prepare_data(config)
    assert not left.parent.exists()


def test_a_folder_of_somebody_else_beside_the_data_is_not_touched(config, tmp_path):
    own = tmp_path / "run" / "data.partial" / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("ten years of work")
    for _ in range(2):  # once after the commit, once when the data is there already
        prepare_data(config)
        assert own.read_text() == "ten years of work"
        assert list(own.parent.iterdir()) == [own]


@pytest.mark.parametrize("clean", [[], [{"step": "length"}]], ids=["as it is", "cleaned"])
@pytest.mark.parametrize("change", ["gone", "written"])
def test_a_file_that_changes_while_it_is_read_leaves_nothing(config, tmp_path, monkeypatch, change, clean):
    """A pattern matches again for each split, so what is gone meanwhile would not be missed."""
    steps = [CleanStepConfig.model_validate(step) for step in clean]
    config = config.model_copy(update={"data": config.data.model_copy(update={"clean": steps})})
    path, grouped = tmp_path / "train" / "b.jsonl", shards.grouped

    def changing(documents, folder, name):
        if "validation" in name and change == "gone":
            path.unlink(missing_ok=True)
        elif "validation" in name:
            write(path, 30, "beaver")
        return grouped(documents, folder, name)

    for module in (shards, cleaning):
        monkeypatch.setattr(module, "grouped", changing)
    monkeypatch.setattr(cleaning, "cores", lambda: 1)
    said = r"must stay as they are while they are read, but .*b\.jsonl (is gone|had \d+ bytes and now has \d+); run"
    if clean and change == "gone":  # its files are listed once
        said = r"b\.jsonl must be a file, but does not exist"
    with pytest.raises(DataError, match=said):
        Run(config).make("clean" if clean else "prepare-data")
    assert not list((tmp_path / "run").rglob("manifest.json"))
