"""Readers of the corpus: every format and compression, articles, held-out documents, and damaged input."""

import bz2
import contextlib
import gzip
import json
import lzma
import random
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from modularforge.config import DataConfig, SourceConfig
from modularforge.data import files
from modularforge.data.corpus import SPLITS, read_documents
from modularforge.data.cutting import split_articles, split_pieces
from modularforge.data.files import find_files, read_text
from modularforge.data.formats import read_file
from modularforge.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

HELD_OUT = {"validation": None, "test": None}


def read(train, split="train", *, data=None, dropped=None, **source):
    """Documents of a split; nothing is held out of the training files unless `validation` or `test` is None."""
    train = train if isinstance(train, list) else str(train)
    chosen = SourceConfig(**{"name": "web", "train": train, "validation": train, "test": train} | source)
    settings = DataConfig(sources=[chosen], **{"min_article_length": 0} | (data or {}))
    return list(read_documents(chosen, split, settings, dropped))


def texts(*arguments, **settings):
    return [document.text for document in read(*arguments, **settings)]


def write_jsonl(path, records, compress=bytes):
    path.write_bytes(compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_compression_gives_the_same_text(tmp_path, ending):
    text = "Déjà vu — 日本語\n\n" * 20_000
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    assert "".join(texts(path)) == text


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_files_of_several_members_are_read_to_the_end(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](b"first ") + COMPRESS[ending](b"second") + b"\0" * 100)
    assert texts(path) == ["first second"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    noise = b"\n".join(random.Random(k).randbytes(600).hex().encode() for k in range(100))
    path.write_bytes(COMPRESS[ending](noise)[:-20])
    said = rf"{path.name} must be a whole {ending} file, but ends in the middle, in line (\d+); copy"
    with pytest.raises(DataError, match=said) as failed:
        texts(path)
    known = noise.count(b"\n", 0, len(noise) // 2) if ending == ".gz" else 0  # the others give whole blocks
    assert known < int(str(failed.value).partition("in line ")[2].partition(";")[0]) <= 100


def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"a.jsonl.gz must be a whole .gz file, but is damaged"):
        texts(path)


def test_jsonl_gives_text_and_label(tmp_path):
    records = [{"body": "one", "lang": "en"}, {"body": "deux", "lang": "fr"}]
    documents = read(write_jsonl(tmp_path / "a.jsonl", records), text_field="body", label_field="lang")
    assert [(document.text, document.label) for document in documents] == [("one", "en"), ("deux", "fr")]


def test_line_separators_of_unicode_do_not_split_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x0cc"}, ensure_ascii=False), encoding="utf-8")
    assert texts(path) == ["a\u2028b\x0cc"]


def test_parquet_is_read_by_column(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"t{i}" for i in range(700)], "id": range(700)}), path)
    assert texts(path) == [f"t{i}" for i in range(700)]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet must have one column text, but has several"):
        texts(tmp_path / "a.parquet")


def test_a_small_compressed_file_with_a_wrong_byte_is_damaged(tmp_path):
    content = bytearray(gzip.compress(b'{"text": "hello"}\n' * 5000))
    content[len(content) // 2] ^= 255
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"must be a whole \.gz file, but is damaged .*; copy or download it again"):
        texts(tmp_path / "a.jsonl.gz")


def test_a_line_that_is_too_long_is_named_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_CHARACTERS", 100_000)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}, {"text": "z" * 400_000}])
    with pytest.raises(DataError, match=r"a\.jsonl:3 must be a line of at most 100,000 characters, but is longer"):
        texts(tmp_path / "a.jsonl")


def test_a_hub_data_set_is_streamed_and_its_wikitext_rows_become_articles(tmp_path):
    rows = ["", " = One = \n", "", " body \n", "", " = Two = \n", "", " = = Sub = = \n", "", " more \n"]
    folder = tmp_path / "wikitext"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / "train.parquet")
    assert texts("train", hub=str(folder)) == [" = One = \n\n body \n\n", " = Two = \n\n = = Sub = = \n\n more \n"]
    assert texts("train", hub=str(folder), format="jsonl") == rows


def test_a_hub_data_set_is_never_asked_for_as_a_whole(tmp_path, monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append(options)
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("train", hub="owner/name") == ["one", "two"]
    assert all(options["streaming"] is True for options in asked)


def test_a_split_that_the_hub_data_set_lacks_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"check hub, hub_config and split of source web") as error:
        texts("nowhere", hub=str(tmp_path))
    assert "the network (`modularforge run-all --config configs/quickstart.yaml` needs none)" in str(error.value)


def test_any_url_of_fsspec_is_read_and_globs_are_sorted():
    store = fsspec.filesystem("memory")
    for name in ("b", "a"):
        store.pipe_file(f"/corpus-test/{name}.txt", name.encode())
    assert texts("memory://corpus-test/*.txt") == ["a", "b"]
    assert texts(["memory://corpus-test/b.txt", "memory://corpus-test/a.txt"]) == ["b", "a"]


def test_the_sample_corpus_lies_in_the_package():
    documents = read("sample:law/validation.jsonl.gz")
    assert len(documents) > 10
    assert {document.label for document in documents} == {"web"}


def test_articles_begin_at_level_one_headings_only():
    lines = [
        " ",
        " = Cadmium = ",
        " ",
        " Halflives ( t1 / 2 ",
        " = 14 @.@ 1 years ) , ( t1 / 2 = ",
        " 44 @.@ 6 days ) ",
        " ",
        " = = History = = ",
        " ",
        " = = = Early = = = ",
        " ",
        " Key : Pld ",
        " = Played , W = ",
        " Wins ",
        " ",
        " = E = mc2 = ",
        " ",
        " Energy ",
    ]
    articles = list(split_articles(lines, "test"))
    assert len(articles) == 2
    assert articles[0].startswith(" = Cadmium = \n")
    assert " = Played , W = " in articles[0]
    assert articles[1] == " = E = mc2 = \n \n Energy \n"


def test_text_before_the_first_heading_is_an_article():
    assert list(split_articles(["preface", "", " = T = ", "", "x"], "test")) == ["preface\n\n", " = T = \n\nx\n"]


def test_wikitext_without_headings_is_refused_before_it_fills_memory():
    with pytest.raises(DataError, match=r"format: text"):
        list(split_articles(("x" * 1000 for _ in range(20_000)), "big.raw"))


def test_a_long_text_is_cut_at_blank_lines_then_lines_then_words():
    assert list(split_pieces(["aa bb\n\ncc dd\nee ff gggg", "ggggg"], limit=10)) == [
        "aa bb\n\n",
        "cc dd\n",
        "ee ff ",
        "ggggggggg",
    ]


def test_pieces_join_to_the_text():
    generator = random.Random(1)
    text = "".join(generator.choice("ab \n") for _ in range(5000))
    pieces = list(split_pieces([text[i : i + 7] for i in range(0, len(text), 7)], limit=50))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 50


def test_short_pieces_are_half_as_long_at_the_least_and_no_heading_is_one(tmp_path):
    text = "".join(f"Chapter {n}\n\n" + "word " * 60 + "\n\n" for n in range(20))
    (tmp_path / "a.txt").write_text(text)
    source = SourceConfig(name="x", train=str(tmp_path / "a.txt"), piece_characters=200)
    pieces = [piece for piece, _ in read_file(str(tmp_path / "a.txt"), source)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 200
    assert min(map(len, pieces[:-1])) >= 100
    assert "piece_characters" not in SourceConfig(name="x", train="a").model_dump(), "old fingerprints stay"


def test_short_documents_are_dropped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * n} for n in (5, 10, 15)])
    dropped: Counter[str] = Counter()
    assert texts(path, data={"min_article_length": 10}, dropped=dropped) == ["x" * 10, "x" * 15]
    assert dropped == {"web": 1}


def test_the_cap_applies_to_training_documents_and_a_tenth_of_it_to_what_is_held_out_of_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {n}"} for n in range(100)])
    cap = {"max_documents_per_source": 30, "heldout_fraction": 0.2}
    assert len(texts(path, data=cap)) == 30
    assert len(texts(path, "test", data=cap, **HELD_OUT)) == 3


def test_held_out_files_that_the_source_names_are_read_whole(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {n}"} for n in range(100)])
    cap = {"max_documents_per_source": 30}
    assert len(texts(path, "validation", data=cap, test=None)) == len(texts(path, "test", data=cap)) == 100


def test_held_out_documents_are_in_no_other_split_whatever_their_order(tmp_path):
    records = [{"text": f"document {n}"} for n in range(1000)]
    path, reverse = write_jsonl(tmp_path / "a.jsonl", records), write_jsonl(tmp_path / "b.jsonl", records[::-1])
    share = {"heldout_fraction": 0.1}
    parts = {split: set(texts(path, split, data=share, **HELD_OUT)) for split in SPLITS}
    assert set.union(*parts.values()) == {record["text"] for record in records}
    assert sum(map(len, parts.values())) == 1000
    assert 60 < len(parts["validation"]) < 140
    assert 60 < len(parts["test"]) < 140
    assert parts == {split: set(texts(reverse, split, data=share, **HELD_OUT)) for split in SPLITS}


def test_only_missing_splits_are_held_out_of_the_training_files(tmp_path):
    records = [{"text": f"document {n}"} for n in range(1000)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "held out by hand"}])
    share = {"heldout_fraction": 0.1}
    assert texts(path, "test", data=share, test=str(other)) == ["held out by hand"]
    parts = [texts(path, split, data=share, validation=None, test=str(other)) for split in ("train", "validation")]
    assert len(parts[0]) + len(parts[1]) == 1000


def test_undecodable_bytes_are_located(tmp_path):
    path = tmp_path / "a.txt"
    good = "é\n".encode() * 100_000
    path.write_bytes(good + b"ok\nbad \xe9 byte")
    with pytest.raises(
        DataError, match=rf"must be UTF-8 text, but byte {len(good) + 7} \(line 100002\) is 0xe9; .*iconv"
    ):
        texts(path)


def test_a_character_cut_off_at_the_end_is_located(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("née".encode()[:2])
    with pytest.raises(DataError, match=r"byte 1 \(line 1\) is 0xc3"):
        texts(path)


def test_a_byte_order_mark_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert "".join(read_text(str(path))) == "hello"


def test_a_broken_json_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a.jsonl:3 must be one JSON object"):
        texts(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "x", "id": 1}, r"a.jsonl:1 must have a column text, but has body, id"),
        ({"text": 5}, r"a.jsonl:1 must have text in column text, but has int"),
        ([1], r"a.jsonl:1 must be a JSON object, but is a list"),
        ({"text": "\ud800"}, r"a.jsonl:1 must hold Unicode text, but has half of a surrogate pair"),
    ],
)
def test_records_of_another_shape_are_refused(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        texts(write_jsonl(tmp_path / "a.jsonl", [record]))


def test_a_missing_parquet_column_and_a_broken_parquet_file_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match=r"must have a column text, but has body"):
        texts(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a.parquet must be a Parquet file"):
        texts(path)


def test_missing_and_empty_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.txt must be a file, but does not exist"):
        texts(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"must be a file, but is a folder"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"\*.txt must match files of the corpus, but matches none"):
        find_files(str(tmp_path / "*.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"source web must have train documents of at least 0 characters, but has none"):
        texts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"name test files for it or raise data.heldout_fraction"):
        texts(write_jsonl(tmp_path / "a.jsonl", [{"text": "only one"}]), "test", **HELD_OUT)


@pytest.mark.parametrize("name", ["one-line.txt.gz", "many-lines.jsonl.gz"])
def test_memory_stays_small_whatever_the_file(tmp_path, name):
    piece = b"word " * 200 if name.startswith("one") else json.dumps({"text": "word " * 200}).encode() + b"\n"
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(piece * 1000)
    script = """
        import sys
        from modularforge.config import DataConfig, SourceConfig
        from modularforge.data.corpus import read_documents

        def kilobytes(field):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

        source = SourceConfig(name="big", train=sys.argv[1])
        before = kilobytes("VmRSS")
        characters = sum(len(d.text) for d in read_documents(source, "train", DataConfig(sources=[source])))
        print(characters, kilobytes("VmHWM") - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / name)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    characters, kilobytes = map(int, output.split())
    assert characters > 90_000_000
    assert kilobytes < 40_000


def test_a_source_whose_documents_are_all_held_out_is_told_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the only document"}])
    share = {"heldout_fraction": 0.49}
    assert any(_finds(path, split, share) for split in ("validation", "test")), "a text that is held out"
    with pytest.raises(DataError, match="all 1 of them fell into the held-out shares; name validation and test files"):
        read(path, data=share, **HELD_OUT)


def _finds(path, split, share):
    with contextlib.suppress(DataError):
        return bool(texts(path, split, data=share, **HELD_OUT))
    return False
