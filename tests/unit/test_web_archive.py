"""Web archives: pages become documents without markup; what is no page is passed over; damage is named."""

import gzip
import zlib

import pytest
import zstandard

from modularforge.config import DataConfig, SourceConfig
from modularforge.data import web_archive
from modularforge.data.corpus import read_documents
from modularforge.errors import DataError

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style><meta charset="utf-8"></head>
<body class=x><h1>Déjà&nbsp;vu</h1><script>var x = "</p>";</script><p>One <b>bold</b>
word &amp; an<i>other</i>.<p>Two<br/>three<ul><li>item<li>last</ul><noscript>no</noscript></body></html>"""
TEXT = "Déjà vu\nOne bold word & another.\nTwo\nthree\nitem\nlast"


def record(kind, content, **headers):
    lines = {"WARC-Type": kind, "WARC-Record-ID": "<urn:uuid:1>", **headers, "Content-Length": str(len(content))}
    head = "WARC/1.0\r\n" + "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return head.encode() + b"\r\n" + content + b"\r\n\r\n"


def answer(body, kind="text/html; charset=UTF-8", status="200 OK", **headers):
    named = {"Content-Type": kind, **headers}
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{n.replace('_', '-')}: {value}\r\n" for n, value in named.items())
    content = head.encode() + b"\r\n" + body
    return record("response", content, **{"Content-Type": "application/http; msgtype=response"})


INFO = record("warcinfo", b"software: test\r\n", **{"Content-Type": "application/warc-fields"})


def read(path, records, pack=bytes, data=None, **source):
    path.write_bytes(b"".join(pack(item) for item in records) if data is None else data)
    chosen = SourceConfig(name="web", train=str(path), validation=str(path), **source)
    settings = DataConfig(sources=[chosen], min_article_length=0)
    return [document.text for document in read_documents(chosen, "validation", settings)]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.warc", bytes),
        ("a.warc.gz", gzip.compress),
        ("a.wet.zst", zstandard.compress),
        ("a b%20.WET.gz", gzip.compress),
    ],
)
def test_extracted_text_and_pages_are_documents(tmp_path, name, pack):
    records = [
        INFO,
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        record("conversion", "plain — text\n".encode(), **{"Content-Type": "text/plain"}),
        answer(PAGE.encode()),
        record("resource", b"a file", **{"Content-Type": "text/plain"}),
        record("metadata", b"x: y"),
    ]
    assert read(tmp_path / name, records, pack) == ["plain — text\n", TEXT, "a file"]


@pytest.mark.parametrize("size", [1, 7])
def test_records_do_not_depend_on_where_reading_stops(tmp_path, size, monkeypatch):
    whole = b"".join([INFO, answer(PAGE.encode()), record("conversion", b"text")])
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    monkeypatch.setattr(web_archive, "decompressed", lambda url: iter(pieces))
    assert read(tmp_path / "a.warc", [], data=b"") == [TEXT, "text"]


def chunked(body):
    return (
        b"".join(b"%x;ext\r\n%s\r\n" % (len(body[k : k + 50]), body[k : k + 50]) for k in range(0, len(body), 50))
        + b"0\r\n\r\n"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "windows-1252", "shift_jis"])
def test_a_page_is_read_in_the_encoding_it_names(tmp_path, encoding):
    said = "日本語のページ" if encoding == "shift_jis" else "naïve façade"
    by_header = answer(said.encode(encoding), f'text/plain; Charset="{encoding}"')
    page = f"<html><head><meta content='text/html; charset={encoding}'></head><body>{said}".encode(encoding)
    assert read(tmp_path / "a.warc", [by_header, answer(page, "text/html")]) == [said, said]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chunked(PAGE.encode()), {"Transfer_Encoding": "chunked"}),
        (gzip.compress(PAGE.encode()), {"Content_Encoding": "gzip"}),
        (zlib.compress(PAGE.encode()), {"Content_Encoding": "deflate"}),
        (chunked(gzip.compress(PAGE.encode())), {"Transfer_Encoding": "chunked", "Content_Encoding": "gzip"}),
    ],
    ids=["chunked", "gzip", "deflate", "both"],
)
def test_a_page_is_unpacked_as_its_answer_says(tmp_path, body, headers):
    assert read(tmp_path / "a.warc", [answer(body, **headers)]) == [TEXT]


def test_what_is_no_text_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(web_archive, "MOST_BYTES", 5000)
    records = [
        answer(b"\x89PNG\0\0", "image/png"),
        answer(b"moved", status="301 Moved"),
        answer(b"x" * 6000),
        answer(b"<html><body></body></html>"),
        record("response", b"\0" * 99, **{"WARC-Identified-Payload-Type": "video/mp4"}),
        record("conversion", b"kept"),
    ]
    assert read(tmp_path / "a.warc.gz", records, gzip.compress) == ["kept"]


def test_pages_that_cannot_be_read_are_counted_and_the_others_kept(tmp_path, caplog):
    records = [
        answer(b"\xff\xfe\xfa"),
        answer(b"text", "text/plain; charset=klingon"),
        answer(b"squeezed", Content_Encoding="br"),
        answer(gzip.compress(b"x" * 999)[:20], Content_Encoding="gzip"),
        answer(b"zz\r\n", Transfer_Encoding="chunked"),
        record("conversion", b"kept"),
    ]
    assert read(tmp_path / "a.warc", records) == ["kept"]
    assert "a.warc: 2 pages are not in the encoding that they name; they are left out" in caplog.text
    assert "a.warc: 3 pages are compressed in another way, or cut off; they are left out" in caplog.text


GOOD = record("conversion", b"text " * 40)


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (GOOD + GOOD[:150], "a.warc", r"a\.warc must be whole, but ends within the record at byte \d+; copy"),
        (gzip.compress(GOOD) + gzip.compress(GOOD)[:60], "a.warc.gz", r"must be a whole \.gz file, but ends in"),
        (b"plain text, no archive\n" * 9, "a.warc", r"a\.warc must be a web archive \(WARC\), but byte 0 begins no"),
        (b"PK\x03\x04" + bytes(99), "a.warc", r"but byte 0 is the first of a zip archive"),
        (GOOD + b"junk\r\n\r\n" + GOOD, "a.warc", r"but byte \d+ begins no record; copy or download it again"),
        (GOOD + b"x" * 70_000, "a.warc", r"but byte \d+ begins no record"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\n", "a.warc", r"must say how long each record is, but that"),
        (GOOD.replace(b"Content-Length: 200", b"Content-Length: -5"), "a.warc", r"must say how long each record is"),
    ],
    ids=["cut", "cut gzip", "text", "zip", "junk", "long junk", "no length", "odd length"],
)  # fmt: skip
def test_a_damaged_archive_is_named_with_the_place(tmp_path, data, name, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path / name, [], data=data)
