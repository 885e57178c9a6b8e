"""Ids that others made are text again, and the same ids; our token files are Megatron's; damaged ones are named."""

import itertools
import json
import os
import struct
from pathlib import Path

import fsspec
import numpy as np
import pytest
from typer.testing import CliRunner

from modularforge.cli import app
from modularforge.config import Config, DataConfig, SourceConfig
from modularforge.data import token_arrays
from modularforge.data.corpus import read_documents
from modularforge.data.prepare import prepare_corpus
from modularforge.data.token_arrays import export_megatron
from modularforge.data.token_files import open_token_file
from modularforge.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from modularforge.errors import DataError

TEXTS = [f"The {animal} says “{sound}” – déjà vu, naïve café number {n}. " * 3
         for n in range(7) for animal, sound in (("owl", "hoo"), ("cat", "miau"), ("狗", "汪汪"))]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer, and its file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer(TEXTS, 400)
    save_tokenizer(made, folder)
    return load_tokenizer(folder), str(folder / "tokenizer.json")


def ids_of(tokenizer):
    return [[*tokenizer[0].encode(text).ids, tokenizer[0].token_to_id("<eos>")] for text in TEXTS]


def flat_ids(tokenizer) -> list[int]:
    return list(itertools.chain(*ids_of(tokenizer)))


def read(path, tokenizer, **source):
    chosen = SourceConfig(name="ids", train=str(path), validation=str(path), tokenizer=tokenizer[1], **source)
    data = DataConfig(sources=[chosen], min_article_length=0)
    return [document.text for document in read_documents(chosen, "validation", data)]


def write_megatron(stem, documents, code=8, dtype="<u2", modes=b"", version=1, magic=b"MMIDIDX\0\0", per_document=1):
    """Megatron's files written as its format says: each document in so many sequences."""
    sequences = [part.tolist() for ids in documents for part in np.array_split(np.array(ids, np.int64), per_document)]
    lengths = [len(ids) for ids in sequences]
    size = np.dtype(dtype).itemsize
    starts = [sum(lengths[:k]) * size for k in range(len(lengths))]
    firsts = [k * per_document for k in range(len(documents) + 1)]
    (stem.parent / f"{stem.name}.bin").write_bytes(np.array(list(itertools.chain(*sequences)), dtype).tobytes())
    head = struct.pack("<9sQBQQ", magic, version, code, len(lengths), len(firsts))
    arrays = struct.pack(f"<{len(lengths)}i{len(starts)}q{len(firsts)}q", *lengths, *starts, *firsts)
    path = stem.parent / f"{stem.name}.idx"
    path.write_bytes(head + arrays + modes)
    return path


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")], ids=["uint16", "int32", "int64"])
@pytest.mark.parametrize("per_document", [1, 3])
def test_megatrons_files_are_read(tmp_path, tokenizer, code, dtype, per_document):
    path = write_megatron(tmp_path / "a 100%", ids_of(tokenizer), code, dtype, per_document=per_document)
    assert read(path, tokenizer) == TEXTS
    assert read(str(path).replace(".idx", ".bin"), tokenizer, format="megatron") == TEXTS


def test_the_mode_of_each_sequence_is_passed_over(tmp_path, tokenizer):
    path = write_megatron(tmp_path / "modes", ids_of(tokenizer), modes=bytes(len(TEXTS)))
    assert read(path, tokenizer) == TEXTS


@pytest.mark.parametrize("dtype", ["<u2", "<i4", ">i4", "<i8", "<u4"])
def test_arrays_are_cut_at_special_tokens(tmp_path, tokenizer, dtype, monkeypatch):
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 37)
    np.save(tmp_path / "a.npy", np.array(flat_ids(tokenizer), dtype))
    assert [text for text in read(tmp_path / "a.npy", tokenizer) if text] == TEXTS


def test_rows_of_an_array_are_one_stream(tmp_path, tokenizer):
    ids = flat_ids(tokenizer)
    ids += [tokenizer[0].token_to_id("<pad>")] * (-len(ids) % 16)
    np.save(tmp_path / "rows.npy", np.array(ids, np.uint16).reshape(-1, 16))
    assert [text for text in read(tmp_path / "rows.npy", tokenizer) if text] == TEXTS


@pytest.mark.parametrize(("kind", "dtype"), [("uint16", "<u2"), ("uint32", "<u4")])
def test_bare_ids_are_read(tmp_path, tokenizer, kind, dtype):
    np.array(flat_ids(tokenizer), dtype).tofile(tmp_path / "train.bin")
    assert [text for text in read(tmp_path / "train.bin", tokenizer, format=kind) if text] == TEXTS


def test_ids_without_ends_are_cut_where_they_are_many(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_arrays, "LONGEST_DOCUMENT", 50)
    monkeypatch.setattr(token_arrays, "CHUNK_TOKENS", 20)
    ids = tokenizer[0].encode("word " * 300, add_special_tokens=False).ids
    np.save(tmp_path / "a.npy", np.array(ids, np.uint16))
    found = read(tmp_path / "a.npy", tokenizer)
    assert len(found) > 1
    assert "".join(found) == "word " * 300


def config_of(files, tmp_path, **source):
    sources = [{"name": "web", "train": files, "validation": files, "test": files} | source]
    data = {"sources": sources, "vocab_size": 400, "min_article_length": 1}
    return Config.model_validate({"data": data, "output_dir": str(tmp_path / "run"), "experts": {"count": 2},
                                  "partition": {"method": "random"}, "model": {"context_length": 16}})  # fmt: skip


def test_exported_token_files_come_back_as_the_same_text(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare_corpus(config_of(str(path), tmp_path), tmp_path / "scratch", tmp_path / "data")
    files = [open_token_file(tmp_path / "data", split) for split in ("test", "train", "validation")]
    assert len(list(export_megatron(files, tmp_path / "out"))) == 3
    file = files[1]
    expected = write_megatron(tmp_path / "expected", [file.document(k).tolist() for k in range(file.num_documents)])
    for ending in (".idx", ".bin"):
        assert (tmp_path / f"out/train{ending}").read_bytes() == expected.with_suffix(ending).read_bytes()
    assert read(tmp_path / "out/train.idx", (None, str(tmp_path / "data"))) == TEXTS
    with pytest.raises(DataError, match=r"test.idx must not be there, but is"):
        list(export_megatron(files, tmp_path / "out"))


def test_the_command_exports_splits_and_partitions(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = tmp_path / "settings.yaml"
    settings.write_text(config_of(str(path), tmp_path).model_dump_json())
    assert CliRunner().invoke(app, ["prepare-data", "--config", str(settings)]).exit_code == 0
    done = CliRunner().invoke(app, ["export-tokens", str(tmp_path / "out"), "--config", str(settings)])
    assert done.exit_code == 0, done.output
    assert "train: 21 documents" in done.output
    names = {"partition-0", "partition-1", "test", "train", "validation"}
    files = {f"{name}.{ending}" for name in names for ending in ("bin", "idx")}
    assert set(os.listdir(tmp_path / "out")) == files | {"tokenizer.json"}


def broken(tmp_path, tokenizer, name):
    """A damaged file of this kind."""
    ids, stem = ids_of(tokenizer), tmp_path / "a"
    flat = np.array(flat_ids(tokenizer), np.uint16)
    if name == "cut bin":
        path = write_megatron(stem, ids)
        os.truncate(tmp_path / "a.bin", 100)
    elif name == "cut idx":
        path = write_megatron(stem, ids)
        os.truncate(path, path.stat().st_size - 3)
    elif name == "backwards":
        path = write_megatron(stem, ids)
        content = path.read_bytes()
        path.write_bytes(content[:-8] + struct.pack("<q", 2))
    elif name == "no bin":
        path = write_megatron(stem, ids)
        (tmp_path / "a.bin").unlink()
    elif name == "version":
        path = write_megatron(stem, ids, version=2)
    elif name == "magic":
        path = write_megatron(stem, ids, magic=b"TNTIDX\0\0\0")
    elif name == "floats":
        path = write_megatron(stem, ids, code=7, dtype="<f4")
    elif name == "ids":
        path = write_megatron(stem, [*ids, [70000]], 4, "<i4")
    elif name == "negative":
        path = write_megatron(stem, [*ids, [-1]], 4, "<i4")
    elif name in ("npy", "objects", "floats npy", "columns"):
        path = tmp_path / "a.npy"
        array = {"objects": np.array([{}], object), "floats npy": np.ones(5)}.get(name, flat)
        array = np.asfortranarray(flat[:20].reshape(4, 5)) if name == "columns" else array
        np.save(path, array, allow_pickle=True)
        if name == "npy":
            os.truncate(path, path.stat().st_size - 3)
    elif name == "text":
        path = tmp_path / "a.npy"
        path.write_text("plain text")
    else:
        path = tmp_path / "a.bin"
        path.write_bytes(flat.tobytes() + b"x")
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut bin", r"a\.bin must have \d+ bytes, but has 100; copy or download it again"),
        ("cut idx", r"a\.idx must have \d+ bytes for its 21 sequences and 21 documents, but has \d+; copy"),
        ("backwards", r"a\.idx must say where its documents begin, but goes back or beyond its end"),
        ("no bin", r"a\.bin must be a file, but does not exist"),
        ("version", r"a\.idx must be an index of version 1, but is of 2"),
        ("magic", r"a\.idx must be an index of Megatron token files \(MMIDIDX\), but is not"),
        ("floats", r"a\.idx must be of integer ids .*, but is of type 7"),
        ("ids", r"must hold ids below the \d+ of its tokenizer, but token \d+ is 70000; set tokenizer of source ids"),
        ("negative", r"must hold ids below the \d+ of its tokenizer, but token \d+ is -1"),
        ("npy", r"a\.npy must have \d+ bytes, but has \d+"),
        ("objects", r"a\.npy must be an array of ids .*, but is of type object and shape \(1,\)"),
        ("floats npy", r"a\.npy must be an array of ids .*, but is of type float64"),
        ("columns", r"a\.npy must be an array of ids .* by columns"),
        ("text", r"a\.npy must be an array of NumPy \(\.npy\), but is text; set the format"),
        ("odd", r"a\.bin must hold whole ids of uint16, but has \d+ bytes"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, tokenizer, name, said):
    path = broken(tmp_path, tokenizer, name)
    with pytest.raises(DataError, match=said):
        read(path, tokenizer, **({"format": "uint16"} if name == "odd" else {}))


def test_ids_want_the_name_of_their_tokenizer(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(
        DataError, match=r"must name the tokenizer that made them, but names none; set tokenizer to its"
    ):
        read(tmp_path / "a.npy", (None, None))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json must be a tokenizer\.json, but cannot be read"):
        read(tmp_path / "a.npy", (None, str(tmp_path / "tokenizer.json")))
    with pytest.raises(DataError, match=r"nowhere\.json must be a file, but does not exist"):
        read(tmp_path / "a.npy", (None, str(tmp_path / "nowhere.json")))
    with pytest.raises(DataError, match=r"a\.npy must be UTF-8 text, but is a NumPy array; give it a name that ends"):
        read(tmp_path / "a.npy", (None, None), format="text")


def test_sources_of_text_are_recorded_as_they_were():
    assert "tokenizer" not in SourceConfig(name="web", train="a.txt").model_dump()
    assert SourceConfig(name="web", train="a.npy", tokenizer="t.json").model_dump()["tokenizer"] == "t.json"


def test_files_of_an_object_store_are_read(tmp_path, tokenizer):
    write_megatron(tmp_path / "a", ids_of(tokenizer))
    np.save(tmp_path / "a.npy", np.array(flat_ids(tokenizer), np.uint16))
    store = fsspec.filesystem("memory")
    for name in ("a.idx", "a.bin", "a.npy"):
        store.pipe_file(f"/token-arrays/{name}", (tmp_path / name).read_bytes())
    store.pipe_file("/token-arrays/tokenizer.json", Path(tokenizer[1]).read_bytes())
    elsewhere = (None, "memory://token-arrays/tokenizer.json")
    assert read("memory://token-arrays/*.idx", elsewhere) == TEXTS
    assert [text for text in read("memory://token-arrays/a.npy", elsewhere) if text] == TEXTS
