"""Preparation by several tasks makes the very bytes of one process, however many tasks there are."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.errors import MissingArtifactError
from launcher.tasks import build_groups, build_tasks, finished_tasks
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data import partition, shards
from modularforge.data.pieces import Piece, share_of
from modularforge.errors import ConfigError, DataError
from modularforge.pipeline import SHARED_WORK
from modularforge.run import Run
from tests.conftest import tiny_values

WORDS = ["ship", "wave", "harbour", "sailor", "court", "statute", "clause", "section", "île", "§", "proof", "lemma"]
Values = dict[str, Any]
PREPARING = (*SHARED_WORK, "prepare-data", "partition")


def write_files(folder: Path) -> list[Values]:
    """Two sources: one of labelled records in several files, with empty and short ones, and one with its own splits."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(7):
        lines = []
        for place in range(0 if number == 3 else 40):
            label = f"topic {(8 - number + place // 14) % 9}" if place % 5 else None
            text = " ".join(generator.choice(WORDS, generator.integers(1, 40)))
            lines.append(json.dumps({"text": f"{number} {place} {text}", "topic": label}))
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name, count in {"train": 30_000, "valid": 3_000, "test": 3_000}.items():
        (folder / f"book.{name}.txt").write_text(" ".join(generator.choice(WORDS, count // 7)))
    return [
        {"name": "web", "train": str(folder / "*.jsonl.gz"), "label_field": "topic"},
        {"name": "book"} | {split: str(folder / f"book.{file}.txt") for split, file in SPLIT_FILES.items()},
    ]


SPLIT_FILES = {"train": "train", "validation": "valid", "test": "test"}


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Values:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    data = {"sources": write_files(tmp_path / "corpus"), "vocab_size": 300, "min_article_length": 30}
    data |= {"heldout_fraction": 0.1, "max_documents_per_source": None}
    return tiny_values(tmp_path / "run", data=data)


def configured(values: Values, tasks: int | None, folder: Path) -> Config:
    """The same settings for a number of tasks, in a folder of its own."""
    values = {**values, "output_dir": str(folder), "cluster": {"prepare_tasks": tasks}}
    return make_config({**values, "data_dir": str(folder / "data")}, "tests")


def prepare(config: Config) -> dict[str, str]:
    """Do what the jobs of a launcher do; hashes of all files of the data and the partitions."""
    for task in build_tasks(config):
        if task.group in PREPARING:
            for stage in task.stages:
                Run(config).make(stage, task.index)
    run = Run(config)
    made = [run.require(stage) for stage in ("prepare-data", "partition")]
    return {name: entry.digest for artifact in made for name, entry in artifact.manifest.files.items()}


def finish(config: Config, *names: str) -> None:
    for task in build_tasks(config):
        if task.name in names:
            for stage in task.stages:
                Run(config).make(stage, task.index)


def test_the_bytes_are_those_of_one_process_for_any_number_of_tasks(values: Values, tmp_path: Path) -> None:
    alone = prepare(configured(values, None, tmp_path / "alone"))
    metadata = json.loads((tmp_path / "alone/data/metadata.json").read_text())
    assert len(metadata["labels"]) == 11
    assert metadata["labels"][1:] != sorted(metadata["labels"][1:])
    for tasks in (1, 2, 5):
        config = configured(values, tasks, tmp_path / str(tasks))
        assert prepare(config) == alone
        assert Run(config).require("prepare-data").manifest.fingerprint == fingerprint(tmp_path / "alone")
        assert not (tmp_path / str(tasks) / "data-parts").exists(), "the corpus holds all of it"


def fingerprint(folder: Path) -> str:
    found: str = json.loads((folder / "data/manifest.json").read_text())["fingerprint"]
    return found


def test_clusters_are_those_of_one_process(values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "BATCH_DOCUMENTS", 8)
    values["partition"] = {"method": "clustered", "cluster_sample_documents": 40}
    alone = prepare(configured(values, None, tmp_path / "alone"))
    for tasks in (1, 4):
        config = configured(values, tasks, tmp_path / str(tasks))
        finish(config, *(task.name for task in build_tasks(config) if task.group in PREPARING[:-1]))
        with monkeypatch.context() as patch:
            patch.setattr(partition, "nearest", None)  # the tasks have placed all documents
            assert prepare(config) == alone
        assert not (tmp_path / str(tasks) / "data-parts").exists()
        assert {task.name for task in build_tasks(config) if task.group in PREPARING} <= finished(config)
    after = {group.name: group.after for group in build_groups(build_tasks(config))}
    assert after["centres"] == ("prepare-data",)
    assert after["assign"] == ("centres",)
    assert after["partition"] == ("assign",)
    assert after["backbone"] == ("prepare-data",), "which reads all documents, however they are divided"
    assert set(after["expert"]) == {"backbone", "partition"}


def finished(config: Config) -> set[str]:
    return finished_tasks(Run(config), build_tasks(config))


def test_a_limit_of_documents_is_that_of_one_process(values: Values, tmp_path: Path) -> None:
    values["data"]["max_documents_per_source"] = 50
    alone = prepare(configured(values, None, tmp_path / "alone"))
    assert prepare(configured(values, 3, tmp_path / "three")) == alone


def test_examples_keep_what_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 300)
    files = []
    for number in range(4):
        lines = [json.dumps({"prompt": f"What is {number} {k}?", "response": f"It is {k}."}) for k in range(30)]
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("\n".join(lines))
    data = {"sources": [{"name": "own", "train": [*map(str, files)]}], "vocab_size": 300, "heldout_fraction": 0.1}
    values = tiny_values(tmp_path / "run", data=data, task="instruction")
    alone = prepare(configured(values, None, tmp_path / "alone"))
    assert any(name.endswith("learned.bin") for name in alone)
    assert prepare(configured(values, 3, tmp_path / "three")) == alone


def test_tasks_run_side_by_side_behind_the_vocabulary_and_before_the_data(values: Values, tmp_path: Path) -> None:
    config = configured(values, 3, tmp_path / "three")
    groups = {group.name: group for group in build_groups(build_tasks(config))}
    assert [task.name for task in groups["tokenise"].tasks] == ["tokenise-0", "tokenise-1", "tokenise-2"]
    assert groups["tokenise"].after == ("vocabulary",)
    assert groups["prepare-data"].after == ("tokenise",)
    assert all(task.is_worker for task in groups["tokenise"].tasks)
    finish(config, "vocabulary", "tokenise-0", "tokenise-2")
    assert finished_tasks(Run(config), build_tasks(config)) == {"vocabulary", "tokenise-0", "tokenise-2"}
    with pytest.raises(
        MissingArtifactError, match=r"tokenise-1 must be finished first.*`modularforge tokenise --index 1`"
    ):
        Run(config).make("prepare-data")
    finish(config, "tokenise-1", "prepare-data")
    done = finished_tasks(Run(config), build_tasks(config))
    assert done == {"vocabulary", "tokenise-0", "tokenise-1", "tokenise-2", "prepare-data"}
    assert Run(config).make("tokenise", 1).manifest.kind == "corpus", "a job that comes late has nothing to do"
    with pytest.raises(ConfigError, match=r"--index must be between 0 and 2 \(cluster.prepare_tasks is 3\), but is 3"):
        Run(config).plan("tokenise", 3)


def test_data_that_one_process_made_needs_no_tasks(values: Values, tmp_path: Path) -> None:
    prepare(configured(values, None, tmp_path / "alone"))
    config = configured(values, 4, tmp_path / "alone")
    names = {task.name for task in build_tasks(config) if task.group in PREPARING}
    assert finished_tasks(Run(config), build_tasks(config)) == names


def test_one_command_alone_shares_nothing(values: Values, tmp_path: Path) -> None:
    alone = prepare(configured(values, None, tmp_path / "alone"))
    config = configured(values, 3, tmp_path / "three")
    finish(config, "prepare-data")
    found = Run(config).require("prepare-data").manifest.files
    assert {name: entry.digest for name, entry in found.items()}.items() <= alone.items()


# In another process: tokenise share argv[2] of the settings argv[1], and be killed before shard number argv[3]; argv[4]
# are limits of the plan of shards.
KILLED = """
    import json, os, signal, sys
    from modularforge.config import Config
    from modularforge.data import pieces, shards
    from modularforge.run import Run

    config, index, deadly, limits = sys.argv[1:]
    shards.SHARD_BYTES = 2000
    vars(pieces).update(json.loads(limits))
    write, written = shards._write_shard, []

    def write_or_die(*arguments):
        if len(written) == int(deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(*arguments))

    shards._write_shard = write_or_die
    Run(Config.model_validate_json(config)).make("tokenise", int(index))
"""


def killed(config: Config, index: str, **limits: int) -> set[str]:
    """Kill a task before its third shard of text; the shards that it leaves."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), config.model_dump_json(), index, "2", json.dumps(limits)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return {path.name for path in Path(f"{config.data_url}-parts/tokenise-{index}.partial").rglob("*.npz")}


def note_shards(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards of text that are tokenised from now on."""
    written: list[str] = []
    write = shards._write_shard

    def noted(group: Any, parts: Any) -> None:
        written.append(group.path.name)
        write(group, parts)

    patch.setattr(shards, "_write_shard", noted)
    return written


def test_a_killed_task_repeats_only_what_is_missing_of_its_share(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeats_what_is_missing(values, tmp_path, monkeypatch, task=0)


def repeats_what_is_missing(
    values: Values, folder: Path, monkeypatch: pytest.MonkeyPatch, task: int, **limits: int
) -> None:
    """Kill one of three tasks in the middle, repeat all, and compare with what one process makes."""
    alone, others = prepare(configured(values, None, folder / "alone")), [k for k in range(3) if k != task]
    config = configured(values, 3, folder / "three")
    finish(config, "vocabulary", *(f"tokenise-{index}" for index in others))
    before = {index: Run(config).require("tokenise", index).manifest.attempt for index in others}
    left = killed(config, str(task), **limits)
    assert len(left) == 2
    with monkeypatch.context() as patch:
        written = note_shards(patch)
        finish(config, "tokenise-0", "tokenise-1", "tokenise-2")
    assert written
    assert not left & {*written}
    assert before == {index: Run(config).require("tokenise", index).manifest.attempt for index in others}
    assert prepare(config) == alone


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "5.jsonl.gz").unlink(),
        lambda folder: (folder / "9.jsonl.gz").write_bytes((folder / "5.jsonl.gz").read_bytes()),
        lambda folder: (folder / "5.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another", "topic": ""}')),
    ],
    ids=["gone", "new", "changed"],
)
def test_files_that_change_between_tasks_are_refused(
    values: Values, tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    config = configured(values, 2, tmp_path / "two")
    finish(config, "vocabulary")
    change(tmp_path / "corpus")
    with pytest.raises(
        DataError, match=r"must stay as they were when the vocabulary was learned, but .*[59].jsonl.gz is"
    ):
        finish(config, "tokenise-0", "tokenise-1")


def test_a_source_without_documents_of_a_split_is_one_sentence(values: Values, tmp_path: Path) -> None:
    values["data"]["heldout_fraction"] = 1e-9
    config = configured(values, 2, tmp_path / "two")
    finish(config, "vocabulary", "tokenise-0", "tokenise-1")
    with pytest.raises(DataError, match=r"source web must have validation documents .* name validation files for it"):
        Run(config).make("prepare-data")


def test_shares_are_neighbours_of_about_the_same_weight() -> None:
    pieces = [Piece("train", 0, str(number), weight) for number, weight in enumerate((5, 1, 1, 1, 4, 4, 8))]
    found = [share_of(pieces, index, 3) for index in range(3)]
    assert [piece for own in found for piece in own] == pieces
    assert [sum(piece.weight for piece in own) for own in found] == [8, 8, 8]
    assert [len(share_of(pieces[:2], index, 5)) for index in range(5)] == [0, 0, 1, 0, 1]


def test_speech_is_prepared_by_one_job(tmp_path: Path) -> None:
    speech = {"task": "speech", "experts": {"kind": "steering"}, "cluster": {"prepare_tasks": 2}}
    with pytest.raises(ConfigError, match=r"cluster.prepare_tasks must be null with task speech"):
        make_config(tiny_values(tmp_path, **speech), "tests")
