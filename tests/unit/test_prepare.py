"""prepare_corpus and make_partitions: what they write, and that a killed run continues to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Generator

import numpy as np
import pytest

from modularforge.config import Config
from modularforge.data import shards, tokenizer
from modularforge.data.background import in_background
from modularforge.data.partition_files import make_partitions
from modularforge.data.prepare import prepare_corpus
from modularforge.data.token_files import open_token_file
from modularforge.data.tokenizer import BOS, EOS, load_tokenizer, token_byte_lengths
from modularforge.errors import DataError

WORDS = {"sea": "ship wave harbour sailor île", "law": "court statute clause section §"}
SPLITS = {"train": 60, "validation": 5, "test": 7}

# Runs in another process: prepares a corpus with small shards and kills itself before it writes shard number argv[4].
PREPARE = """
    import os, signal, sys
    from pathlib import Path
    from modularforge.config import Config
    from modularforge.data import shards, tokenizer
    from modularforge.data.prepare import prepare_corpus

    config, scratch, output, deadly = sys.argv[1:]
    shards.SHARD_BYTES = 1000
    write, written = shards._write_shard, []

    def write_or_die(*arguments):
        if len(written) == int(deadly):
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(*arguments))

    shards._write_shard = write_or_die
    Path(output).mkdir()
    prepare_corpus(Config.model_validate_json(config), Path(scratch), Path(output))
    print(len(written))
"""


@pytest.fixture
def config(tmp_path):
    """Two domains of short documents in JSONL files."""
    sources: list[dict[str, str]] = []
    for name, words in WORDS.items():
        generator = np.random.default_rng(len(sources))
        source = {"name": name}
        for split, count in SPLITS.items():
            lines = [json.dumps({"text": " ".join(generator.choice(words.split(), 30))}) for _ in range(count)]
            path = tmp_path / f"{name}.{split}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            source[split] = str(path)
        sources.append(source)
    data = {"sources": sources, "vocab_size": 300, "min_article_length": 10}
    return Config.model_validate({"data": data, "experts": {"count": 2}, "model": {"context_length": 16}})


def prepare(config, tmp_path, name="output"):
    (tmp_path / name).mkdir()
    return prepare_corpus(config, tmp_path / "scratch", tmp_path / name), tmp_path / name


def run_elsewhere(config, tmp_path, name, deadly):
    command = [sys.executable, "-c", textwrap.dedent(PREPARE), config.model_dump_json()]
    command += [str(tmp_path / "scratch"), str(tmp_path / name), str(deadly)]
    return subprocess.run(command, capture_output=True, text=True)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(config, split):
    paths = [getattr(source, split) for source in config.data.sources]
    return [json.loads(line)["text"] for path in paths for line in open(path, encoding="utf-8")]


def test_every_document_is_bos_text_eos(config, tmp_path):
    metadata, folder = prepare(config, tmp_path)
    learned = load_tokenizer(folder)
    for split in SPLITS:
        file = open_token_file(folder, split)
        documents = [file.document(index).tolist() for index in range(file.num_documents)]
        assert all(document[0] == BOS and document[-1] == EOS for document in documents)
        assert learned.decode_batch(documents) == texts_of(config, split)
    assert metadata["vocab_size"] == learned.get_vocab_size() <= 300


def test_metadata_counts_documents_tokens_and_bytes_by_label(config, tmp_path):
    metadata, folder = prepare(config, tmp_path)
    assert json.loads((folder / "metadata.json").read_text()) | {"near_copies": {"dropped": 0, "left": 0}} == metadata
    assert metadata["labels"] == ["sea", "law"]
    lengths_V = token_byte_lengths(load_tokenizer(folder))
    for split, count in SPLITS.items():
        file = open_token_file(folder, split)
        for label, name in enumerate(metadata["labels"]):
            row = metadata["splits"][split][name]
            chosen = np.repeat(file.labels == label, file.lengths)
            assert row["documents"] == (file.labels == label).sum() == count
            assert row["tokens"] == chosen.sum()
            assert row["bytes"] == lengths_V[file.tokens[chosen]].sum()


def test_labels_of_a_column_are_numbered_as_they_come(config, tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": "some text " * 3, "kind": kind}) + "\n" for kind in "babc"))
    source = {"name": "web", "train": str(path), "validation": str(path), "test": str(path), "label_field": "kind"}
    settings = config.model_dump() | {"data": {"sources": [source], "vocab_size": 270, "min_article_length": 0}}
    metadata, folder = prepare(Config.model_validate(settings), tmp_path)
    file = open_token_file(folder, "train")
    assert [metadata["labels"][label] for label in file.labels] == list("babc")


@pytest.mark.parametrize("deadly", [0, 4])
def test_a_killed_run_continues_and_writes_the_same_bytes(config, tmp_path, deadly):
    whole = run_elsewhere(config, tmp_path, "whole", -1)
    total = int(whole.stdout)
    assert total > 8
    for shard in (tmp_path / "scratch").rglob("*"):
        if shard.is_file():
            shard.unlink()
    killed = run_elsewhere(config, tmp_path, "killed", deadly)
    assert killed.returncode == -signal.SIGKILL
    resumed = run_elsewhere(config, tmp_path, "resumed", -1)
    assert int(resumed.stdout) == total - deadly
    assert files_of(tmp_path / "resumed") == files_of(tmp_path / "whole")


def test_shards_of_any_size_give_the_same_files(config, tmp_path, monkeypatch):
    _, expected = prepare(config, tmp_path, "large")
    monkeypatch.setattr(shards, "SHARD_BYTES", 700)
    monkeypatch.setattr(shards, "BATCH_BYTES", 200)
    _, found = prepare(config, tmp_path, "small")
    assert files_of(found) == files_of(expected)


def test_long_documents_go_through_the_tokenizer_in_pieces(config, tmp_path, monkeypatch):
    _, expected = prepare(config, tmp_path, "whole")
    monkeypatch.setattr(tokenizer, "LONGEST_TEXT", 60)
    for shard in (tmp_path / "scratch").rglob("*.npz"):
        shard.unlink()
    _, found = prepare(config, tmp_path, "in pieces")
    assert files_of(found) == files_of(expected)


def test_scratch_of_other_settings_is_discarded(config, tmp_path):
    prepare(config, tmp_path, "first")
    (before,) = (tmp_path / "scratch").iterdir()
    other = config.model_copy(update={"data": config.data.model_copy(update={"vocab_size": 280})})
    metadata, _ = prepare(other, tmp_path, "second")
    (after,) = (tmp_path / "scratch").iterdir()
    assert before != after
    assert metadata["vocab_size"] <= 280


def test_a_file_that_changed_meanwhile_is_tokenised_again(config, tmp_path):
    prepare(config, tmp_path, "first")
    path = config.data.sources[0].test
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "a new last document"}) + "\n")
    metadata, _ = prepare(config, tmp_path, "second")
    assert metadata["splits"]["test"]["sea"]["documents"] == SPLITS["test"] + 1


def test_an_error_of_the_reader_reaches_the_caller(config, tmp_path):
    path = config.data.sources[1].validation
    with open(path, "a", encoding="utf-8") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"law.validation.jsonl:6 must be one JSON object"):
        prepare(config, tmp_path)


def test_a_missing_file_is_refused_before_any_work(config, tmp_path):
    os.unlink(config.data.sources[1].test)
    with pytest.raises(DataError, match=r"law.test.jsonl must be a file"):
        prepare(config, tmp_path)
    assert not (tmp_path / "scratch").exists()


def test_a_consumer_that_stops_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def numbers():
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    before = threading.active_count()
    items = in_background(numbers())
    assert isinstance(items, Generator)
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert closed.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize("method", ["random", "clustered", "curriculum", "domain"])
def test_partitions_hold_the_documents_they_list(config, tmp_path, method):
    _, corpus = prepare(config, tmp_path)
    settings = config.model_copy(update={"partition": config.partition.model_copy(update={"method": method})})
    (tmp_path / "parts").mkdir()
    summary = make_partitions(settings, corpus, tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "partitions.json").read_text()) == summary
    train, listed = open_token_file(corpus, "train"), []
    for number, row in enumerate(summary["partitions"]):
        part = open_token_file(tmp_path / "parts", f"partition-{number}")
        indices = np.load(tmp_path / "parts" / f"partition-{number}.documents.npy")
        assert part.num_documents == row["documents"] == len(indices)
        assert part.tokens.size == row["tokens"] == sum(row["tokens_by_label"].values())
        for own, index in enumerate(indices):
            assert np.array_equal(part.document(own), train.document(index))
            assert part.labels[own] == train.labels[index]
        listed += indices.tolist()
    assert sorted(listed) == list(range(train.num_documents))
    assert all(("top_words" in row) == (method == "clustered") for row in summary["partitions"])


def test_text_for_everybody_is_written_into_every_partition(config, tmp_path):
    _, corpus = prepare(config, tmp_path)
    names = [source.name for source in config.data.sources]
    experts = config.experts.model_copy(update={"count": len(names) - 1})
    partition = config.partition.model_copy(update={"method": "domain", "everywhere": [names[0]]})
    (tmp_path / "parts").mkdir()
    found = make_partitions(
        config.model_copy(update={"partition": partition, "experts": experts}), corpus, tmp_path / "parts"
    )
    assert found["everywhere"] == [names[0]]
    general = {row["tokens_by_label"][names[0]] for row in found["partitions"]}
    assert len(general) == 1
    assert general.pop() > 0
    for number, row in enumerate(found["partitions"]):
        assert {name for name, tokens in row["tokens_by_label"].items() if tokens} == {names[0], names[number + 1]}


@pytest.mark.parametrize("part", ["tokens.bin", "labels.npy"])
def test_prepared_data_with_ids_that_nobody_knows_is_refused(config, tmp_path, part):
    _, corpus = prepare(config, tmp_path)
    path = corpus / f"train.{part}"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    (tmp_path / "parts").mkdir()
    with pytest.raises(DataError, match=r"of the train documents must be below .*, but one is 65535; run"):
        make_partitions(config, corpus, tmp_path / "parts")


def test_a_source_with_a_password_leaves_none_in_what_is_written(config, tmp_path):
    source = config.data.sources[0].model_copy(update={"hub_config": "http://me:hunter22@host/?token=hunter22"})
    data = config.data.model_copy(update={"sources": [source, config.data.sources[1]]})
    _, folder = prepare(config.model_copy(update={"data": data}), tmp_path)
    assert all(b"hunter22" not in content for content in files_of(folder).values())


def test_partitions_are_the_same_bytes_again_and_other_bytes_with_another_seed(config, tmp_path):
    _, corpus = prepare(config, tmp_path)
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        partition = config.partition.model_copy(update={"method": "random", "overlap_ratio": 0.2})
        make_partitions(config.model_copy(update={"partition": partition, "seed": seed}), corpus, tmp_path / name)
        folders.append(files_of(tmp_path / name))
    assert folders[0] == folders[1]
    assert folders[0] != folders[2]
