"""Files as people have them: other encodings, archives, wrong endings, patterns, links, odd names and records."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from checkpoints import paths
from modularforge.config import DataConfig, SourceConfig
from modularforge.data import files
from modularforge.data.corpus import read_documents
from modularforge.data.files import find_files
from modularforge.errors import DataError, StoreError
from tests.conftest import ROOT

TEXT = "The otter waits near the bend. Über den Fluß geht's 12 mal.\n" * 60
RECORDS = "".join(json.dumps({"text": f"The otter {n} waits.", "lang": "en"}) + "\n" for n in range(50)).encode()


def read(location, **source):
    location = location if isinstance(location, list) else str(location)
    held_out = {"validation": location, "test": location}
    chosen = SourceConfig(**{"name": "web", "train": location, **held_out, **source})
    return list(read_documents(chosen, "train", DataConfig(sources=[chosen], min_article_length=0)))


def texts(location, **source):
    return [document.text for document in read(location, **source)]


def labels(records, folder, **source):
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [document.label for document in read(path, label_field="lang", **source)]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def tar_of(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("one.txt", content)
    return buffer.getvalue()


def parquet_of(table):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


PARQUET = parquet_of(pyarrow.table({"text": ["a", "b"]}))
TAR = tar_of(one=TEXT.encode(), two=b"x" * 2000)
OTHER_FILES = [
    ("a.jsonl", gzip.compress(RECORDS), r"is gzip data; give it a name that ends in \.gz"),
    ("a.jsonl.gzip", gzip.compress(RECORDS), "is gzip data"),
    ("a.jsonl", zstandard.ZstdCompressor().compress(RECORDS), r"is Zstandard data; .*\.zst"),
    ("a.txt", lzma.compress(RECORDS), r"is xz data; .*\.xz"),
    ("a.txt", bz2.compress(RECORDS), r"is bzip2 data; .*\.bz2"),
    ("a.txt", PARQUET, "is a Parquet file; .*format: parquet"),
    ("a.txt", zip_of(TEXT), "is a zip archive .*; unpack it"),
    ("a.txt", TAR, "is a tar archive; unpack it"),
    ("a.tar.gz", gzip.compress(TAR), r"holds a tar archive in its \.gz; unpack it"),
    ("a.tgz", gzip.compress(TAR), "is a tar archive in gzip data; unpack it"),
    ("a.txt.zst", zstandard.ZstdCompressor().compress(TAR), r"holds a tar archive in its \.zst; unpack it"),
    ("a.txt.gz", gzip.compress(gzip.compress(RECORDS)), r"holds gzip data in its \.gz; decompress it from \.gz,"),
    ("a.txt", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(99), "is a 7z archive; unpack it"),
    ("a.txt", b"Rar!\x1a\x07\x01\0" + bytes(99), "is a rar archive; unpack it"),
    ("a.txt", b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF document; extract its text"),
    ("a.txt", b"\x7fELF\2\1\1" + bytes(99), "is a program; leave it out"),
    ("a.txt", b"\x89PNG\r\n\x1a\n" + bytes(99), "is an image"),
    ("a.txt", b"GGUF\3\0\0\0" + bytes(99), "is a GGUF model"),
    ("._a.txt", b"\0\5\x16\7" + bytes(99), "side file of macOS"),
    ("a.txt", bytes(range(1, 5)) + bytes(999), "is binary data .* are NUL"),
    ("a.parquet", RECORDS, "must be a Parquet file, but is text"),
    ("a.parquet", b"", "must be a Parquet file, but is empty"),
    ("a.parquet", gzip.compress(RECORDS), "must be a Parquet file, but is gzip data"),
    ("a.txt.gz", PARQUET, r"must be a whole \.gz file, but is a Parquet file; give it"),
    ("a.txt.zst", gzip.compress(RECORDS), r"must be a whole \.zst file, but is gzip data; .*ends in \.gz"),
    ("a.txt.gz", RECORDS, r"must be a whole \.gz file, but is damaged or not compressed .* take \.gz from its name"),
]


@pytest.mark.parametrize(("name", "content", "message"), OTHER_FILES)
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        texts(put(tmp_path / name, content))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "start", ["PAR1\n", "PARENT", "ORC\n", "GIF89a is", "MZ 4", "BZh9", "RIFFRAFF", "Obj", "7z", "PK"]
)
def test_words_that_begin_like_another_format_are_text(tmp_path, start):
    text = f"{start} and so on. " + "x" * 300 + "ustar " + TEXT
    assert texts(put(tmp_path / "a.txt", text.encode())) == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_conversion_that_is_advised_gives_the_text_back(tmp_path, name, encoding):
    path = put(tmp_path / name, TEXT.encode(encoding))
    with pytest.raises(DataError, match="but is text in UTF-") as caught:
        texts(path)
    command = str(caught.value).partition("(iconv ")[2].partition(")")[0].split()
    converted = subprocess.run(["iconv", *command, str(path)], check=True, capture_output=True).stdout
    assert converted.decode("utf-8-sig") == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift-jis", "gb18030"])
def test_no_encoding_is_guessed_for_other_bytes(tmp_path, encoding):
    text = "日本語のテキスト" if encoding in ("shift-jis", "gb18030") else "Über den Fluß"
    with pytest.raises(DataError, match=r"must be UTF-8 text, but byte .* find out the encoding") as caught:
        texts(put(tmp_path / "a.txt", text.encode(encoding)))
    assert "LATIN1" not in str(caught.value)


def test_a_nul_here_and_there_is_kept_and_told(tmp_path, caplog):
    path = put(tmp_path / "a.jsonl", RECORDS + b'{"text": "a\\u0000b"}\n' * 2)
    assert texts(path)[-1] == "a\0b"
    assert caplog.text.count("a.jsonl has NULs in its text, first in document 51") == 1
    assert texts(put(tmp_path / "b.txt", b"a\0b " * 3 + b"words " * 99))[0].startswith("a\0b")


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstd_with_a_long_window_is_read(tmp_path, window):
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = put(tmp_path / "a.jsonl.zst", compressor.compress(RECORDS) + compressor.flush())
    assert len(texts(path)) == 50


def test_line_ends_marks_and_missing_ends_of_other_systems(tmp_path):
    windows = b"\xef\xbb\xbf" + RECORDS.replace(b"\n", b"\r\n").rstrip()
    assert texts(put(tmp_path / "a.jsonl", windows)) == texts(put(tmp_path / "b.jsonl", RECORDS))
    assert texts(put(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")) == ["one\r\ntwo"]


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LINE_CHARACTERS", 1000)
    with pytest.raises(DataError, match=r"a.jsonl:1 must be a line of at most 1,000 characters, but is longer; write"):
        texts(put(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 300_000 + b'"}'))


@pytest.mark.parametrize("line", [b"[" * 5000, b'{"a":' * 5000, b'{"text": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"])
def test_a_line_that_python_cannot_parse_is_named(tmp_path, line):
    with pytest.raises(DataError, match=r"a\.jsonl:51 must be one JSON object"):
        texts(put(tmp_path / "a.jsonl", RECORDS + line + b"\n"))


@pytest.mark.parametrize("value", ["\ud83d", [], ["en"], {"a": 1}, "a\nb", "\0", "x" * 300])
def test_a_label_that_is_no_line_of_text_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(DataError, match=r"labelled\.jsonl:2 must have a label of one line in column lang") as caught:
        labels([{"text": "a", "lang": "en"}, {"text": "b", "lang": value}], tmp_path)
    assert len(str(caught.value)) < 500


def test_a_missing_label_is_the_source_and_numbers_are_their_text(tmp_path):
    values = [None, float("nan"), "", "None", 5, 1.5, True]
    found = labels([{"text": "a", "lang": value} for value in values], tmp_path)
    assert found == ["web", "web", "web", "None", "5", "1.5", "True"]


def test_parquet_rows_are_named(tmp_path):
    plain, broken = ["plain"] * 700, pyarrow.array([b"plain"] * 700 + [b"caf\xe9"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 701, broken.buffers())
    with pytest.raises(DataError, match=r"a\.parquet, row 701 must hold UTF-8 text, but byte 3 of it is 0xe9"):
        texts(put(tmp_path / "a.parquet", parquet_of(pyarrow.table({"text": column}))))
    table = pyarrow.table({"text": [*plain, None]})
    with pytest.raises(DataError, match=r"b\.parquet, row 701 must have text in column text, but has NoneType"):
        texts(put(tmp_path / "b.parquet", parquet_of(table)))
    table = pyarrow.table({"text": ["a", "b"], "lang": [["en"], ["de"]]})
    with pytest.raises(DataError, match=r"c\.parquet, row 1 must have a label of one line"):
        texts(put(tmp_path / "c.parquet", parquet_of(table)), label_field="lang")


def test_rows_of_a_hub_data_set_are_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"\(train\), row 2 must have text in column text"):
        texts("train", hub=str(tmp_path))


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder of code as people have it, and the working directory in it."""
    for name in ("main.py", "lib/a.py", ".venv/lib/b.py", "lib/.hidden/c.py", "._main.py", "lib/note.txt"):
        put(tmp_path / name, b"x = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.py", ["lib/a.py", "main.py"]),
        ("*.py", ["main.py"]),
        ("**", ["lib/a.py", "lib/note.txt", "main.py"]),
        ("lib/**", ["lib/a.py", "lib/note.txt"]),
        (".venv/**/*.py", [".venv/lib/b.py"]),
        ("**/.hidden/*.py", ["lib/.hidden/c.py"]),
        (".*.py", ["._main.py"]),
        ("l?b/[ab].py", ["lib/a.py"]),
        ("./lib/../**/n*.txt", ["lib/../lib/note.txt"]),
        ("lib**/a.py", ["lib/a.py"]),
    ],
)
def test_patterns_mean_what_they_mean_in_shell_and_python(code, pattern, found):
    assert find_files(pattern) == found
    assert find_files(str(code / pattern)) == [str(code / name) for name in found]


@pytest.mark.parametrize(
    "pattern", ["**/*.py", "*.py", ".venv/**/*.py", "**", "**/.hidden/*.py", "lib/**", "lib**/a.py"]
)
def test_they_mean_the_same_on_an_object_store(code, pattern):
    store = fsspec.filesystem("memory")
    for path in code.rglob("*"):
        if path.is_file():
            store.pipe_file(f"/patterns/{path.relative_to(code)}", path.read_bytes())
    assert find_files(f"memory://patterns/{pattern}") == [f"memory:///patterns/{name}" for name in find_files(pattern)]


def test_only_hidden_matches_are_told_apart_from_none(code):
    with pytest.raises(DataError, match=r"matches none \(hidden ones only where the pattern names their dot\)"):
        find_files("lib/*.rs")


ODD_NAMES = ["run [v2]/animals [v2].txt", "std::vector.txt", "a*b.txt", "what?.txt", "::x::.txt", "zip::a.txt"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_that_exists_is_no_pattern_and_no_chain(tmp_path, name):
    path = put(tmp_path / name, TEXT.encode())
    put(tmp_path / "axb.txt", b"another file")
    assert texts(path) == texts(f"file://{path}") == [TEXT]


@pytest.mark.parametrize("name", ["~a.txt", "~root", "~/a.txt", "${HOME}.txt"])
def test_a_name_is_no_home_and_no_variable(tmp_path, monkeypatch, name):
    """A pattern finds names that would mean something else if they were written by hand."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / name, TEXT.encode())
    assert texts("**") == texts(f"./{name}") == texts(f"file://{tmp_path}/{name}") == [TEXT]
    assert name.startswith("~/") or texts(name) == [TEXT]


def test_a_file_in_an_archive_is_judged_by_its_own_name(tmp_path):
    archive = tmp_path / "corpus [v2].zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("in/a.jsonl", RECORDS)
        file.writestr("in/b.txt", TEXT)
    assert len(texts(f"zip://in/a.jsonl::{archive}")) == 50
    assert len(texts(f"zip://in/*.jsonl::{archive}")) == 50
    assert texts(f"zip://in/b.txt::{archive}") == [TEXT]


def test_a_pattern_below_a_folder_in_brackets(tmp_path):
    for name in ("b", "a"):
        put(tmp_path / "run [v2]" / f"std::{name}.txt", name.encode())
    assert texts(tmp_path / "run [v2]" / "*.txt") == ["a", "b"]


def test_the_sample_is_found_where_the_package_lies_below_a_folder_in_brackets(tmp_path):
    place = tmp_path / "a [b]" / "std::c*"
    for package in ("modularforge", "checkpoints"):
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
        from modularforge.config import DataConfig, SourceConfig
        from modularforge.data.corpus import read_documents
        source = SourceConfig(name="law", train="sample:law/validation.jsonl.gz", validation="x", test="x")
        print(len(list(read_documents(source, "train", DataConfig(sources=[source])))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=place, capture_output=True, text=True)
    assert int(done.stdout) > 10, done.stderr


def test_odd_keys_of_an_object_store():
    fsspec.filesystem("memory").pipe_file("/odd-keys/run [v2]/animals [v2].txt", TEXT.encode())
    for location in ("run [v2]/animals [v2].txt", "run [v2]/*.txt", "run [v2]/animals [[]v2].txt"):
        assert texts(f"memory://odd-keys/{location}") == [TEXT]
    assert paths.filesystem("s3://bucket/docs/std::vector.txt")[1] == "bucket/docs/std::vector.txt"


def test_links_are_followed_loops_end_and_each_file_comes_once(tmp_path):
    put(tmp_path / "elsewhere" / "far.txt", b"far")
    put(tmp_path / "data" / "near.txt", b"near")
    put(tmp_path / "data" / "sub" / "deep.txt", b"deep")
    for name, target in (("far", "../elsewhere"), ("loop", "."), ("up", ".."), ("again", "sub"), ("dead", "nowhere")):
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "data" / "also.txt").symlink_to("near.txt")
    found = {Path(name).resolve().name for name in find_files(str(tmp_path / "data/**/*.txt"))}
    assert found == {"far.txt", "near.txt", "deep.txt"}
    assert len(find_files(str(tmp_path / "data/**/*.txt"))) == 3
    assert find_files(str(tmp_path / "data/f*/*.txt")) == [str(tmp_path / "data/far/far.txt")]


def test_a_file_that_several_patterns_match_is_read_once(tmp_path):
    path = put(tmp_path / "a.txt", b"once")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert texts([str(tmp_path / "*.txt"), str(path), str(tmp_path / "./a.*")]) == ["once"]


def test_pipes_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(StoreError, match=r"must be a file, but is a named pipe; put the file itself there"):
        texts(tmp_path / "pipe.txt")
    assert find_files(str(put(tmp_path / "a.txt", b"x").parent / "*.txt")) == [str(tmp_path / "a.txt")]
    with pytest.raises(DataError, match=r"must be a file, but is a folder; name its files"):
        texts(tmp_path)


@pytest.fixture
def unprivileged():
    """The rights of nobody, where the tests run as root."""
    if os.getuid() == 0:
        os.seteuid(65534)
    yield
    os.seteuid(os.getuid())


@pytest.fixture
def locked(tmp_path):
    put(tmp_path / "locked" / "a.txt", b"x").chmod(0)
    (tmp_path / "locked").chmod(0o600)
    yield tmp_path / "locked"
    (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize("name", ["a.txt", "*.txt", "**/*.txt", "[a].txt"])
def test_files_and_folders_that_must_not_be_read_are_told(locked, unprivileged, name):
    with pytest.raises(DataError, match=r"must be readable, but the storage says: .*Permission denied"):
        texts(locked / name)


def test_a_bucket_that_may_be_read_and_not_listed_wants_names(monkeypatch):
    fsspec.filesystem("memory").pipe_file("/closed/a b%20.txt", b"x" * 200)

    def deny(self, *arguments, **options):
        raise PermissionError("Access Denied")

    for name in ("ls", "find", "glob", "walk"):
        monkeypatch.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{name}", deny)
    assert texts("memory://closed/a b%20.txt") == ["x" * 200]
    with pytest.raises(DataError, match=r"may be listed, but the storage says: Access Denied; .*name each file"):
        texts("memory://closed/*.txt")


def test_a_file_that_vanishes_between_two_readings_is_told(tmp_path):
    last = [put(tmp_path / name, b"some text") for name in ("a.txt", "b.txt")][-1]
    source = SourceConfig(name="web", train=str(tmp_path / "*.txt"), validation="x", test="x")
    documents = read_documents(source, "train", DataConfig(sources=[source], min_article_length=0))
    next(documents)
    last.unlink()
    with pytest.raises(DataError, match=r"b\.txt must be a file, but does not exist"):
        next(documents)


class Quiet(SimpleHTTPRequestHandler):
    """A server that knows no ranges, as Python's own."""

    def log_message(self, *arguments):
        pass


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(403)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path):
    """Serve a folder, or refuse everything; returns the address."""
    servers = []

    def serve(handler=None):
        handler = handler or partial(Quiet, directory=str(tmp_path))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_query_of_a_web_address_is_neither_ending_nor_pattern(tmp_path, web):
    put(tmp_path / "a.jsonl", RECORDS)
    put(tmp_path / "a.jsonl.gz", gzip.compress(RECORDS))
    put(tmp_path / "large.txt", b"word " * (2 << 20))  # more than one block of a client that wants ranges
    address = web()
    queries = ("a.jsonl?X-Amz-Signature=1&x=[a]*", "a.jsonl.gz?download=true", "a.jsonl#there.txt")
    assert all(len(texts(f"{address}/{query}")) == 50 for query in queries)
    assert sum(map(len, texts(f"{address}/large.txt"))) == 10 << 20


def test_what_a_web_server_refuses_is_told_without_the_secret(web):
    with pytest.raises(DataError, match=r"must be readable, but the storage says: 403") as caught:
        texts(f"{web(Refusing)}/a.jsonl?X-Amz-Signature=verysecret")
    assert "verysecret" not in str(caught.value)


@pytest.mark.parametrize(("act", "name"), [(texts, "a.jsonl"), (find_files, "*.jsonl")])
def test_a_server_that_does_not_answer_is_no_missing_file(act, name):
    with pytest.raises(DataError, match=r"must be readable, but the storage says: Cannot connect") as caught:
        act(f"http://somebody:hunter22@127.0.0.1:9/{name}")
    assert "hunter22" not in str(caught.value)


def test_a_client_with_exceptions_of_its_own_gets_one_sentence(monkeypatch):
    class ConnectError(Exception):
        __module__ = "httpx"

    def fail(self, path, **options):
        raise ConnectError("no route to the server")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "exists", fail)
    with pytest.raises(DataError, match="must be readable, but the storage says: no route to the server"):
        find_files(["memory://odd/*.jsonl"])
