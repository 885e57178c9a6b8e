"""A large corpus has its tokens in shards, which stay as tasks wrote them, the same for any number of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from modularforge.cli import app
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.data import pieces, shards
from modularforge.data.loader import batches
from modularforge.data.token_files import TokenFile
from modularforge.errors import DataError
from modularforge.run import Run
from modularforge.stage_outputs import Corpus, domains_of, own_domains
from modularforge.stages import prepare as prepare_stage
from modularforge.stored_tokens import partition_tokens, token_file
from tests.conftest import tiny_values
from tests.pipeline.test_preparation_tasks import configured, finish, prepare, repeats_what_is_missing, write_files

Values = dict[str, Any]
LIMITS = {"SHARDED_ABOVE": 0, "SHARD_WEIGHT": 6000, "PIECE_BYTES": 1500}  # of the plan of shards


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Values:
    """A corpus in files of which some are divided, in seven shards of training text."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    for name, limit in LIMITS.items():
        monkeypatch.setattr(pieces, name, limit)
    return sharded_values(tmp_path)


def sharded_values(tmp_path: Path) -> Values:
    """Settings of a corpus of three sources, which is written too."""
    sources = write_files(tmp_path / "corpus")
    lines = [json.dumps({"text": f"own {k} " + "wave harbour " * (k % 9 + 3), "topic": "own"}) for k in range(150)]
    (tmp_path / "corpus" / "own.jsonl").write_text("\n".join(lines))
    sources.append({"name": "own", "train": str(tmp_path / "corpus" / "own.jsonl"), "label_field": "topic"})
    data = {"sources": sources, "vocab_size": 300, "min_article_length": 30, "heldout_fraction": 0.1}
    partition = {"method": "random"}
    return tiny_values(tmp_path / "run", data={**data, "max_documents_per_source": None}, partition=partition)


def documents_of(file: TokenFile, labels: list[str]) -> list[tuple[str, list[int]]]:
    return [(labels[file.labels[k]], file.document(k).tolist()) for k in range(file.num_documents)]


def read(run: Run, split: str) -> list[tuple[str, list[int]]]:
    corpus = Corpus(run.require("prepare-data"))
    return documents_of(corpus.tokens(split), corpus.labels)


def test_shards_are_the_same_for_any_number_of_tasks_and_hold_what_one_file_would(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "SHARDED_ABOVE", 1 << 40)
        whole = configured(values, None, tmp_path / "whole")
        assert "train.tokens.bin" in prepare(whole)
    alone = prepare(configured(values, None, tmp_path / "alone"))
    names = sorted(name for name in alone if name.endswith("tokens.bin"))
    assert names[-1] == "validation-00000.tokens.bin"
    assert len([name for name in names if name.startswith("train")]) > 4
    assert "partition-0.spans.npy" in alone
    assert "partition-0.tokens.bin" not in alone, "partitions copy no token"
    run = Run(configured(values, None, tmp_path / "alone"))
    for split in ("train", "validation", "test"):
        assert read(run, split) == read(Run(whole), split)
    for tasks in (2, 5):
        config = configured(values, tasks, tmp_path / str(tasks))
        assert prepare(config) == alone
        assert not (tmp_path / str(tasks) / "data-parts").exists()
    for index in range(2):
        assert np.array_equal(ids(part_of(run, index)), ids(part_of(Run(whole), index)))


def ids(file: TokenFile) -> Any:
    return np.asarray(file.tokens)


def part_of(run: Run, index: int) -> TokenFile:
    return partition_tokens(run.require("partition"), index)


def test_tokens_stay_where_tasks_wrote_them(values: Values, tmp_path: Path) -> None:
    config = configured(values, 2, tmp_path / "two")
    finish(config, "vocabulary", "tokenise-0", "tokenise-1")
    run = Run(config)
    inodes = {
        name: (Path(run.url("tokenise", index)) / name).stat().st_ino
        for index in (0, 1)
        for name in run.require("tokenise", index).manifest.files
        if name.endswith("tokens.bin")
    }
    finish(config, "prepare-data")
    assert inodes
    assert {name: (tmp_path / "two/data" / name).stat().st_ino for name in inodes} == inodes


def test_batches_of_a_partition_in_spans_are_those_of_one_file(values: Values, tmp_path: Path) -> None:
    config = configured(values, None, tmp_path / "alone")
    prepare(config)
    file = part_of(Run(config), 1)
    assert type(file.tokens).__name__ == "SpannedTokens"
    own, other = batches(file.tokens, 16, 4, 3), batches(np.asarray(file.tokens), 16, 4, 3)
    for _ in range(40):
        (inputs, targets, place), (same, following, position) = next(own), next(other)
        assert inputs.equal(same)
        assert targets.equal(following)
        assert place == position


def test_near_copies_of_held_out_documents_are_left_out_of_the_index(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(5)
    texts = [" ".join(generator.choice(["ash", "oak", "elm", "fir", "yew", "box", "bay"], 60)) for _ in range(120)]
    lines = [json.dumps({"text": text, "topic": "trees"}) for text in [*texts, *(f"{text} end" for text in texts)]]
    (tmp_path / "corpus" / "own.jsonl").write_text("\n".join(lines))
    run = Run(configured(values, None, tmp_path / "alone"))
    files = prepare(run.config)
    dropped = run.require("prepare-data").manifest.facts["near_copies"]["dropped"]
    assert dropped > 5
    spans = np.load(tmp_path / "alone/data/train.spans.npy")
    assert len(spans) > 1, "the tokens are still in the shards"
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "SHARDED_ABOVE", 1 << 40)
        whole = configured(values, None, tmp_path / "whole")
        prepare(whole)
    assert read(run, "train") == read(Run(whole), "train")
    assert prepare(configured(values, 3, tmp_path / "three")) == files


def test_a_killed_task_repeats_only_what_is_missing_of_its_shards(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeats_what_is_missing(values, tmp_path, monkeypatch, task=2, **LIMITS)


def test_a_mixture_of_spans_trains_as_one_of_a_whole_file(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbone and expert, in windows and in rows of whole documents: the same weights, and the same draws."""
    mix = [{"source": "own", "weight": 3}, {"source": "book", "epochs": 2}]
    values["backbone"]["steps"] = values["experts"]["steps"] = 5
    found: dict[str, list[Any]] = {"stream": [], "documents": []}
    for folder, limit in (("whole", 1 << 40), ("shards", 0)):
        monkeypatch.setattr(pieces, "SHARDED_ABOVE", limit)
        config = configured({**values, "data": {**values["data"], "mix": mix}}, None, tmp_path / folder)
        prepare(config)
        assert ("train.spans.npy" in Run(config).require("prepare-data").manifest.files) is (not limit)
        for packing, runs in found.items():
            data = config.data.model_copy(update={"packing": packing})
            run = Run(config.model_copy(update={"output_dir": str(tmp_path / folder / packing), "data": data}))
            made = [run.make("backbone"), run.make("expert", 0)]
            files = [entry.digest for one in made for name, entry in one.manifest.files.items() if "safe" in name]
            runs.append((files, [one.manifest.facts["mixture"] for one in made]))
    for whole, spans in found.values():
        assert whole == spans
        assert whole[1][0]["own"]["epochs"] > whole[1][0]["book"]["epochs"] > 0


def test_each_of_many_partitions_is_an_artifact_of_its_own(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = configured(values, None, tmp_path / "together")
    prepare(together)
    monkeypatch.setattr(prepare_stage, "MOST_TOGETHER", 1)
    config = configured(values, 2, tmp_path / "each")
    prepare(config)
    run, other = Run(config), Run(together)
    partitions = run.require("partition")
    assert not [name for name in partitions.manifest.files if name.startswith("partition-")]
    for index in range(config.experts.count):
        assert np.array_equal(ids(part_of(run, index)), ids(part_of(other, index)))
        identity = run._partition_identity(index)
        assert identity == Run(config)._partition_identity(index) == other._partition_identity(index)
        assert domains_of(partitions, index) == own_domains(partitions)[index]
    before = sorted((tmp_path / "each").glob("data/partitions-*/*/manifest.json"))
    times = [path.stat().st_mtime_ns for path in before]
    assert len(before) == config.experts.count
    (tmp_path / "each/data/partitions").rename(tmp_path / "gone")
    finish(config, "prepare-data")
    assert [path.stat().st_mtime_ns for path in before] == times, "those that are there stay"


def test_partitions_of_other_data_are_refused(values: Values, tmp_path: Path) -> None:
    config = configured(values, None, tmp_path / "alone")
    prepare(config)
    partitions = Run(config).require("partition")
    changed = {**values, "data": {**values["data"], "min_article_length": 40}}
    other = configured(changed, None, tmp_path / "other")
    prepare(other)
    (tmp_path / "alone/data/manifest.json").write_bytes((tmp_path / "other/data/manifest.json").read_bytes())
    with pytest.raises(DataError, match=r"must divide the data in .*, but divides other data"):
        partition_tokens(partitions, 0)


def test_a_shard_that_was_cut_short_is_one_sentence(values: Values, tmp_path: Path) -> None:
    config = configured(values, None, tmp_path / "alone")
    prepare(config)
    path = tmp_path / "alone/data/train-00001.tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(Exception, match=r"train-00001.tokens.bin must have \d+ bytes, but has \d+"):
        np.asarray(token_file(Run(config).require("prepare-data"), "train").tokens)


def exported(config: Config, folder: Path) -> dict[str, bytes]:
    """What `export-tokens` writes of a run, by name."""
    settings = folder.with_suffix(".yaml")
    settings.write_text(to_yaml(config))
    done = CliRunner().invoke(app, ["export-tokens", str(folder), "--config", str(settings)])
    assert done.exit_code == 0, done.output
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("together", [256, 1], ids=["partitions together", "each an artifact of its own"])
def test_exported_ids_are_those_of_a_corpus_without_shards(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "SHARDED_ABOVE", 1 << 40)
        whole = configured(values, None, tmp_path / "whole")
        prepare(whole)
    monkeypatch.setattr(prepare_stage, "MOST_TOGETHER", together)
    config = configured(values, 2, tmp_path / "shards")
    prepare(config)
    found = exported(config, tmp_path / "out")
    names = ("train", "validation", "test", *(f"partition-{k}" for k in range(config.experts.count)))
    assert set(found) == {f"{name}.{ending}" for name in names for ending in ("bin", "idx")} | {"tokenizer.json"}
    assert all(found[f"{name}.bin"] for name in names)
    assert found == exported(whole, tmp_path / "expected")


def test_partitions_of_their_own_without_shards_are_exported(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SHARDED_ABOVE", 1 << 40)
    together = configured(values, None, tmp_path / "together")
    prepare(together)
    monkeypatch.setattr(prepare_stage, "MOST_TOGETHER", 1)
    config = configured(values, None, tmp_path / "each")
    prepare(config)
    assert exported(config, tmp_path / "out") == exported(together, tmp_path / "expected")


def test_a_shard_with_a_changed_byte_is_not_exported(values: Values, tmp_path: Path) -> None:
    config = configured(values, None, tmp_path / "alone")
    prepare(config)
    path = tmp_path / "alone/data/train-00001.tokens.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    (tmp_path / "settings.yaml").write_text(to_yaml(config))
    arguments = ["export-tokens", str(tmp_path / "out"), "--config", str(tmp_path / "settings.yaml")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert "train-00001.tokens.bin" in str(done.exception or done.output)
    assert not (tmp_path / "out").exists()
