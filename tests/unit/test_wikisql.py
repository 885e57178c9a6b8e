"""WikiSQL's archive becomes questions and SQL; what else lies in an archive is passed over, and nothing is unpacked."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from modularforge.data.wikisql import convert_wikisql, sql_text
from modularforge.errors import DataError
from tests.conftest import run_command

COLUMNS = ["Player", "Year", "School/Team"]
QUERIES = [
    (
        {"agg": 0, "sel": 2, "conds": [[0, 0, "Terrence O'Hara"]]},
        "SELECT School/Team FROM table WHERE Player = 'Terrence O''Hara'",
    ),
    (
        {"agg": 3, "sel": 0, "conds": [[1, 1, 1990], [1, 2, 2000.5]]},
        "SELECT COUNT(Player) FROM table WHERE Year > 1990 AND Year < 2000.5",
    ),
    ({"agg": 1, "sel": 1, "conds": []}, "SELECT MAX(Year) FROM table"),
]


@pytest.mark.parametrize(("query", "text"), QUERIES)
def test_a_query_of_numbers_is_written_as_sql(query: dict[str, Any], text: str) -> None:
    assert sql_text(query, COLUMNS) == text


def archive(path: Path, extra: list[tuple[tarfile.TarInfo, bytes]] = [], **changes: Any) -> str:  # noqa: B006
    question = {"phase": 1, "table_id": "t-1", "question": "Which team?", "sql": QUERIES[0][0], **changes}
    table = {"id": "t-1", "header": COLUMNS, "types": ["text"] * 3, "rows": [["x", "1990", "y"]]}
    with tarfile.open(path, "w:bz2") as file:
        for info, content in extra:
            file.addfile(info, io.BytesIO(content))
        for split in ("train", "dev", "test"):
            for name, record in ((f"data/{split}.jsonl", question), (f"data/{split}.tables.jsonl", table)):
                content = f"{json.dumps(record)}\n".encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return str(path)


def test_the_archive_becomes_files_for_the_preset(tmp_path: Path) -> None:
    written = convert_wikisql(archive(tmp_path / "data.tar.bz2"), str(tmp_path / "out"))
    assert written == {"train": 1, "validation": 1, "test": 1}
    record = json.loads((tmp_path / "out" / "validation.jsonl").read_text())
    assert record == {"question": "Which team?", "columns": COLUMNS, "sql": QUERIES[0][1]}
    done = run_command("modularforge", "wikisql", str(tmp_path / "data.tar.bz2"), str(tmp_path / "again"))
    assert "validation: 1 questions" in done.stdout


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_paths_links_and_devices_of_an_archive_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"question": "secret"}\n')
    extra = [
        (member("../../evil.txt", size=4), b"evil"),
        (member("/tmp/evil-absolute.txt", size=4), b"evil"),
        (member("train.jsonl", tarfile.SYMTYPE, str(tmp_path / "secret.jsonl")), b""),
        (member("dev.jsonl", tarfile.LNKTYPE, "../secret.jsonl"), b""),
        (member("test.jsonl", tarfile.CHRTYPE), b""),
    ]
    before = {path.name for path in tmp_path.parent.iterdir()}
    convert_wikisql(archive(tmp_path / "data.tar.bz2", extra), str(tmp_path / "out"))
    assert "secret" not in (tmp_path / "out" / "train.jsonl").read_text()
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert not Path("/tmp/evil-absolute.txt").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl"}


@pytest.mark.parametrize(
    "changes",
    [
        {"table_id": "other"},
        {"sql": {"agg": 9, "sel": 0, "conds": []}},
        {"sql": {"agg": 0, "sel": -1, "conds": []}},
        {"sql": {"agg": 0, "sel": 0, "conds": [[0, 0]]}},
        {"sql": "SELECT"},
        {"sql": {"agg": True, "sel": 0, "conds": []}},
    ],
)
def test_a_question_that_does_not_fit_its_table_is_named_with_its_line(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tar\.bz2: train\.jsonl:1 must be a question on a table of WikiSQL"):
        convert_wikisql(archive(tmp_path / "data.tar.bz2", **changes), str(tmp_path / "out"))


def test_what_is_no_archive_or_lacks_a_file_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data.tar.bz2").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"must be WikiSQL's data\.tar\.bz2, but cannot be read"):
        convert_wikisql(str(tmp_path / "data.tar.bz2"), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match=r"must hold train\.jsonl of WikiSQL, but does not"):
        convert_wikisql(str(tmp_path / "empty.tar"), str(tmp_path / "out"))
    with pytest.raises(DataError, match="does not exist"):
        convert_wikisql(str(tmp_path / "none.tar"), str(tmp_path / "out"))
