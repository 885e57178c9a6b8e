"""Cleaning by several tasks makes the very bytes of one process, however many tasks there are."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from checkpoints import paths
from checkpoints.errors import MissingArtifactError
from launcher.tasks import build_groups, build_tasks
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data import clean_shards, clean_shares, cleaning, pieces, shards
from modularforge.errors import ConfigError, DataError
from modularforge.pipeline import CLEANING
from modularforge.run import Run
from tests.conftest import tiny_values
from tests.pipeline.test_preparation_tasks import configured, fingerprint, finish, finished, prepare
from tests.unit.test_cleaning import changed_words, prose

Values = dict[str, Any]
EXAM = "which captain of the seven grey ships left the harbour before the storm began that winter morning"
STEPS: list[Values] = [
    {"step": "repair"},
    {"step": "personal"},
    {"step": "exact"},
    {"step": "length", "options": {"min_words": 20}},
    {"step": "near", "options": {"num_buckets": 5, "hashes_per_bucket": 4}},
    {"step": "repetition", "sources": ["letters"]},
]
BETWEEN = ["inventory", "filter_0-0", "filter_0-1", "filter_0-2", "copies_1", "filter_1-0", "filter_1-1", "filter_1-2"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a small corpus into many units and shards."""
    monkeypatch.setattr(cleaning, "cores", lambda: 1)
    monkeypatch.setattr(clean_shares, "cores", lambda: 1)
    monkeypatch.setattr(cleaning, "SHARDS_A_FILE", 2)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    monkeypatch.setattr(pieces, "UNIT_WEIGHT", 4000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2500)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def write_corpus(folder: Path) -> None:
    """Files of two sources, one in seven files; copies across files, sources and splits."""
    folder.mkdir(exist_ok=True)
    texts = [[prose(100 * number + k) for k in range(3)] for number in range(7)]
    texts[1].append(texts[5][0])
    texts[6].append(changed_words(texts[0][2], 0.97))
    texts[4].insert(0, "Write to jane.doe@company.org from 8.8.4.4, or to joe@company.org. " + prose(900))
    texts[3].append(f"{prose(901)} {EXAM} {prose(902)}")
    texts[2][:] = ["Too short, all of this."]
    held = {"validation": [prose(910), texts[3][1]], "test": [prose(911), changed_words(texts[4][3], 0.97)]}
    letters = {"train": [texts[5][2], *map(prose, range(920, 924)), "Again and again.\n" * 30], **held}
    web_held = {f"web {split}": [prose(930 + k)] for k, split in enumerate(("validation", "test"))}
    for name, lines in {**{f"web {k}%": own for k, own in enumerate(texts)}, **letters, **web_held}.items():
        rows = [json.dumps({"text": text}) for text in lines]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "exam.txt").write_text(EXAM)


@pytest.fixture
def values(corpus: Path, tmp_path: Path) -> Values:
    return values_of(corpus, tmp_path)


def values_of(corpus: Path | str, folder: Path) -> Values:
    sources = [
        {"name": name, **{split: f"{corpus}/{file.format(split)}" for split in ("train", "validation", "test")}}
        for name, file in (("web", "web {}.jsonl"), ("letters", "{}.jsonl"))
    ]
    sources[0]["train"] = f"{corpus}/web ?%.jsonl"
    last = {"step": "decontaminate", "options": {"sets": [f"{corpus}/exam.txt"], "n_grams": 8}}
    data = {"sources": sources, "vocab_size": 300, "min_article_length": 15, "clean": [*STEPS, last]}
    data["max_documents_per_source"] = None
    return tiny_values(folder / "run", data=data, partition={"method": "random"})


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the files that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return made(configured(values_of(corpus, folder), None, folder))


def made(config: Config) -> dict[str, str]:
    """Do what the jobs of cleaning do; hashes of all files of cleaned documents."""
    finish(config, *(task.name for task in build_tasks(config) if task.group in CLEANING))
    return {name: entry.digest for name, entry in Run(config).make("clean").manifest.files.items()}


def test_cleaned_documents_are_those_of_one_process_for_any_number_of_tasks(
    values: Values, alone: dict[str, str], tmp_path: Path
) -> None:
    assert len([name for name in alone if name.startswith("documents/train-0000")]) > 4
    for tasks in (1, 3, 9):
        config = configured(values, tasks, tmp_path / str(tasks))
        assert made(config) == alone
        assert not (tmp_path / str(tasks) / "data-parts").exists(), "what tasks made is in the whole"
    report = json.loads((tmp_path / "3/data-cleaned/cleaning.json").read_text())
    assert [(one["step"], one["removed"]) for one in report["copies"]] == [("exact", 3), ("near", 2)]
    assert report["copies"][1]["shared_with_held_out"] == 1
    dropped = {(row["step"], row["source"]): row["dropped"] for row in report["counts"]}
    assert {name: count for name, count in dropped.items() if count} == {
        ("exact", "web"): 2,
        ("exact", "letters"): 1,
        ("length", "web"): 1,
        ("near", "web"): 2,
        ("repetition", "letters"): 1,
        ("decontaminate", "web"): 1,
    }


def test_what_tasks_have_cleaned_is_tokenised_by_tasks(values: Values, tmp_path: Path) -> None:
    values["data"]["clean"] = [{"step": "exact"}]
    whole, config = configured(values, None, tmp_path / "alone"), configured(values, 3, tmp_path / "three")
    assert prepare(config) == prepare(whole)
    assert fingerprint(tmp_path / "three") == fingerprint(tmp_path / "alone")
    assert not (tmp_path / "three/data-parts").exists()


def test_passes_wait_for_all_tasks_of_the_one_before(values: Values, tmp_path: Path) -> None:
    config = configured(values, 3, tmp_path / "three")
    groups = {group.name: group.after for group in build_groups(build_tasks(config))}
    assert groups["inventory"] == ()
    assert groups["filter_0"] == ("inventory",)
    assert groups["copies_1"] == ("filter_0",)
    assert groups["filter_1"] == ("copies_1",)
    assert groups["filter_2"] == ("copies_2",)
    assert groups["vocabulary"] == ("filter_2",), "which puts cleaned documents together"
    assert "filter_3" not in groups
    assert {task.name: task.stages for task in build_tasks(config)}["vocabulary"] == ("clean", "vocabulary")
    finish(config, *BETWEEN[:2], *BETWEEN[3:4])
    with pytest.raises(MissingArtifactError, match=r"filter_0-1 must be finished .* `modularforge filter_0 --index 1`"):
        Run(config).make("copies_1")
    finish(config, *BETWEEN)
    assert finished(config) == set(BETWEEN)
    made(config)
    assert set(BETWEEN) < finished(config)
    late = Run(config).make("filter_1", 2)
    assert late.manifest.kind == "cleaned", "a job that comes late has nothing to do"


def test_tasks_clean_on_an_object_store_too(values: Values, alone: dict[str, str]) -> None:
    config = make_config({**values, "output_dir": "memory://cleaning-tasks", "cluster": {"prepare_tasks": 2}}, "tests")
    assert made(config) == alone
    assert not paths.list_folder(f"{config.data_url}-parts")


def test_one_process_cleans_alone_where_no_task_has_begun(
    values: Values, alone: dict[str, str], tmp_path: Path
) -> None:
    files = Run(configured(values, 3, tmp_path / "three")).make("clean").manifest.files
    assert {name: entry.digest for name, entry in files.items()} == alone


# In another process: clean share argv[2] in pass argv[3], of the settings argv[1], and die before shard 3.
KILLED = """
    import os, signal, sys
    from modularforge.config import Config
    from modularforge.data import clean_shares, cleaning, pieces, shards
    from modularforge.run import Run

    config, index, number = sys.argv[1:]
    shards.SHARD_BYTES, pieces.UNIT_WEIGHT, pieces.PIECE_BYTES, cleaning.SHARDS_A_FILE = 1500, 4000, 2500, 2
    cleaning.cores = clean_shares.cores = lambda: 1
    clean, cleaned = cleaning.clean_shard, []

    def clean_or_die(*arguments):
        if len(cleaned) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        cleaned.append(clean(*arguments))
        return cleaned[-1]

    cleaning.clean_shard = clean_or_die
    Run(Config.model_validate_json(config)).make(f"filter_{number}", int(index))
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_task_repeats_only_the_shards_that_it_had_not_cleaned(
    values: Values, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = configured(values, 3, tmp_path / "three")
    finish(config, *BETWEEN[:5] if number else BETWEEN[:1])
    finish(config, f"filter_{number}-0", f"filter_{number}-2")
    before = {index: Run(config).require(f"filter_{number}", index).manifest.attempt for index in (0, 2)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), config.model_dump_json(), "1", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (tmp_path / f"three/data-parts/filter_{number}-1.partial").rglob("pass-*/*.zst")}
    assert len(left) == 2
    written: list[str] = []
    write = paths.write_atomically

    def noted(path: Path, *arguments: Any, **options: Any) -> None:
        written.append(path.name)
        write(path, *arguments, **options)

    monkeypatch.setattr(clean_shards, "write_atomically", noted)
    finish(config, *(f"filter_{number}-{index}" for index in range(3)))
    assert written
    assert not left & {*written}
    assert before == {index: Run(config).require(f"filter_{number}", index).manifest.attempt for index in (0, 2)}
    assert made(config) == alone


def test_files_that_change_before_a_task_reads_them_are_refused(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    config = configured(values_of(tmp_path / "corpus", tmp_path), 2, tmp_path / "two")
    finish(config, "inventory")
    (tmp_path / "corpus/web 5%.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(DataError, match=r"must stay as they were when cleaning began, but .*web 5%.jsonl is gone, new"):
        finish(config, "filter_0-0", "filter_0-1")


def test_a_source_of_which_nothing_is_left_is_one_sentence(values: Values, tmp_path: Path) -> None:
    values["data"]["clean"][3] = {"step": "length", "sources": ["letters"], "options": {"min_words": 10_000}}
    config = configured(values, 2, tmp_path / "two")
    with pytest.raises(DataError, match=r"source letters must have test documents after cleaning, .* by length"):
        made(config)


def test_more_passes_than_there_are_jobs_for_are_refused(values: Values) -> None:
    steps = {"clean": [{"step": "exact"}] * 4}
    with pytest.raises(
        ConfigError, match=r"data.clean must have at most 3 steps .* but has 4; leave some out, or unset"
    ):
        make_config({**values, "data": {**values["data"], **steps}, "cluster": {"prepare_tasks": 2}}, "tests")
    make_config({**values, "data": {**values["data"], **steps}}, "tests")
