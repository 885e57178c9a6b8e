"""Whatever the bytes, readers of corpora, prepared data, tokenizers and model folders say one sentence, and soon."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from checkpoints.safetensors import shard_names
from modularforge.config import ModelConfig, RopeScalingConfig, SourceConfig
from modularforge.data.formats import read_file
from modularforge.data.token_files import TokenFileWriter, check_metadata, open_token_file, read_partitions
from modularforge.data.tokenizer import adopt_tokenizer, token_byte_lengths, train_tokenizer
from modularforge.errors import UserError
from modularforge.model.hub_config import backbone_config, end_tokens, moe_config, parse_config
from modularforge.model.sizes import dense_shapes
from tests.mutation import FUZZ_INPUTS, texts, values

SECONDS = 20.0  # far above what any input takes; a machine may be busy
LETTERS = 1000


def assert_one_sentence(inputs: Iterable[Any], use: Callable[[Any], object]) -> None:
    """Nothing but an error of ours, of one line and not as long as its input; some inputs are still good."""
    good = 0
    for content in inputs:
        started, told = time.monotonic(), ""
        try:
            use(content)
            good += 1
        except UserError as error:
            told = str(error)
        assert len(told) < LETTERS, content[:200]
        assert len(told.splitlines()) < 2, content[:200]
        assert time.monotonic() - started < SECONDS, content[:200]
    assert good, "every input was refused: is the seed itself good?"


def as_json(found: Iterable[Any]) -> Iterable[bytes]:
    """Values as JSON, those that JSON can spell."""
    for value in found:
        try:
            yield json.dumps(value).encode()
        except (ValueError, TypeError):
            continue


RECORD = {"text": "Dökument with words", "lang": "en"}
LINES = (json.dumps(RECORD) + "\n" + json.dumps(RECORD, ensure_ascii=False) + "\n").encode() * 10
ARTICLES = b" = One = \n\n body \n\n = Two = \n\n = = Part = = \n\n more\n"
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def parquet(text: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "lang": ["en", None] * 15}), buffer, **options)
    return buffer.getvalue()


PARQUETS = [
    parquet(["some text é " * 20] * 30),
    parquet(pyarrow.array(["some text"] * 30).dictionary_encode(), compression="zstd"),
]
CORPORA = {
    "a.jsonl": (lambda: texts([LINES]), "lang"),
    "b.jsonl": (lambda: as_json(values(RECORD)), "lang"),
    "a.jsonl.gz": (lambda: (gzip.compress(line, 1) for line in texts([LINES])), "lang"),
    "a.txt": (lambda: texts([LINES]), None),
    "a.raw": (lambda: texts([ARTICLES]), None),
    "a.parquet": (lambda: texts(PARQUETS), "lang"),
} | {
    f"a.txt{ending}": (lambda compress=compress: texts([compress(LINES)], FUZZ_INPUTS // 4), None)
    for ending, compress in COMPRESS.items()
}


@pytest.mark.parametrize("name", CORPORA)
def test_training_text(name: str, tmp_path: Path) -> None:
    inputs, label = CORPORA[name]
    source = SourceConfig(name="web", train="x", label_field=label)

    def read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        for text, _ in read_file(str(tmp_path / name), source):
            text.encode()

    assert_one_sentence(inputs(), read)


@pytest.mark.parametrize("part", ["offsets.npy", "labels.npy", "tokens.bin"])
def test_token_files(part: str, tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path, "train", 300) as writer:
        writer.add(np.arange(40), np.array([10, 10, 20]), np.array([0, 1, 0]))
    path = tmp_path / f"train.{part}"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        file = open_token_file(tmp_path, "train")
        assert sum(len(file.document(index)) for index in range(file.num_documents)) == len(file.tokens)

    assert_one_sentence(texts([path.read_bytes()]), read)


METADATA = {"vocab_size": 300, "end_token": 3, "labels": ["a", "b"], "splits": {"train": {"a": {"documents": 1}}}}
PARTITIONS = {"partitions": [{"documents": 1, "tokens": 2, "tokens_by_label": {"a": 2}, "top_words": ["x"]}] * 2}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
DESCRIPTIONS = [(METADATA, check_metadata), (PARTITIONS, read_partitions), (INDEX, shard_names)]


@pytest.mark.parametrize(("good", "read"), DESCRIPTIONS)
def test_descriptions_of_prepared_data_and_weight_files(good: Any, read: Callable[[bytes, str], object]) -> None:
    seed = json.dumps(good).encode()
    read(seed, "here")
    for inputs in (texts([seed]), as_json(values(good))):
        assert_one_sentence(inputs, lambda content: read(content, "here"))


CONFIGS = [
    backbone_config(ModelConfig(), 400),
    moe_config(ModelConfig(rope_scaling=RopeScalingConfig(rope_type="yarn", factor=2.0)), 400, 3, 2),
    moe_config(ModelConfig(family="qwen3"), 400, 3, 2),
]


@pytest.mark.parametrize("good", CONFIGS)
def test_settings_of_a_model_folder(good: dict[str, Any]) -> None:
    def read(content: bytes) -> None:
        found = parse_config(content, "config.json")
        end_tokens(found)
        dense_shapes(ModelConfig(width=8, layers=found["num_hidden_layers"]), found["vocab_size"])

    seed = json.dumps(good).encode()
    read(seed)
    for inputs in (texts([seed]), as_json(values(json.loads(seed)))):
        assert_one_sentence(inputs, read)


@pytest.mark.parametrize("content", [b"[]", b"null", b"5", b"", b"[" * 5000, b'{"a":' * 5000, b"\xff", b'{"a": NaN}'])
def test_settings_that_are_no_object(content: bytes) -> None:
    assert_one_sentence([json.dumps(CONFIGS[0]).encode(), content], lambda found: parse_config(found, "config.json"))


TOKENIZER = train_tokenizer(["the cat sat on the mat"], 262).to_str().encode()
SETTINGS = {"eos_token": {"content": "<eos>", "special": True}, "tokenizer_class": "X", "extra_special_tokens": ["<a>"]}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_tokenizers_of_other_people(name: str, tmp_path: Path) -> None:
    """The tokenizers library panics on some, which is no Exception in Python."""
    source, output = tmp_path / "source", tmp_path / "output"
    for folder in (source, output):
        folder.mkdir()
    (source / "tokenizer.json").write_bytes(TOKENIZER)
    (source / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')

    def read(content: bytes) -> None:
        (source / name).write_bytes(content)
        tokenizer, end = adopt_tokenizer(source, output)
        assert end not in tokenizer.encode("The <eos> cat").ids[1:]
        token_byte_lengths(tokenizer)

    good = TOKENIZER if name == "tokenizer.json" else json.dumps(SETTINGS).encode()
    for inputs in (texts([good]), as_json(values(json.loads(good)))):
        assert_one_sentence(inputs, read)
