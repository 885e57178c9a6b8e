"""WikiSQL (arXiv 1709.00103) from its archive: raw tables and queries as numbers become questions, columns and SQL.

Nothing is unpacked: the members that are wanted are read from the stream, whatever their paths say, and all others,
links and devices among them, are passed over. What is written are JSON lines for the preset `wikisql`.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from checkpoints import paths
from checkpoints.parsing import parse_object
from checkpoints.redact import redact
from modularforge.data.files import open_bytes
from modularforge.errors import DataError, one_line

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
SPLITS = {"train": "train", "dev": "validation", "test": "test"}
LONGEST_LINE = 1 << 24  # bytes; a table's rows are one line
QUESTIONS, TABLES = ".jsonl", ".tables.jsonl"


def convert_wikisql(archive: str, output: str) -> dict[str, int]:
    """Write `train`, `validation` and `test.jsonl` into a folder; returns how many questions each has.

    Raises DataError where the archive, or a record of it, is not as WikiSQL's.
    """
    name, found = redact(archive), _members(archive)
    written: dict[str, int] = {}
    for short, split in SPLITS.items():
        if missing := [f"{short}{ending}" for ending in (QUESTIONS, TABLES) if f"{short}{ending}" not in found]:
            raise DataError(f"{name} must hold {missing[0]} of WikiSQL, but does not; fetch data.tar.bz2 again")
        headers = {str(table.get("id")): table.get("header") for table, _ in found[f"{short}{TABLES}"]}
        records = [_example(record, headers, f"{name}: {origin}") for record, origin in found[f"{short}{QUESTIONS}"]]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        paths.replace_bytes(paths.join(output, f"{split}.jsonl"), lines.encode())
        written[split] = len(records)
    return written


def sql_text(query: Mapping[str, Any], columns: list[str]) -> str:
    """A query as SQL; raises LookupError, TypeError or ValueError where it is none of the table's."""
    aggregate, column = AGGREGATES[_index(query["agg"])], columns[_index(query["sel"])]
    conditions = [
        f"{columns[_index(place)]} {OPERATORS[_index(operator)]} {_value(value)}"
        for place, operator, value in query["conds"]
    ]
    chosen = f"{aggregate}({column})" if aggregate else column
    return f"SELECT {chosen} FROM table" + (" WHERE " + " AND ".join(conditions) if conditions else "")


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no place in a list")
    return value


def _value(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else "'" + str(value).replace("'", "''") + "'"


def _example(record: Mapping[str, Any], headers: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    try:
        columns = [str(column) for column in headers[str(record["table_id"])]]
        question = str(record["question"])
        return {"question": question, "columns": columns, "sql": sql_text(record["sql"], columns)}
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{origin} must be a question on a table of WikiSQL, but is not ({one_line(repr(error))}); fetch it again"
        ) from error


def _members(archive: str) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """The records of the wanted files by their bare name, each with what names it."""
    wanted = {f"{short}{ending}" for short in SPLITS for ending in (QUESTIONS, TABLES)}
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    try:
        with open_bytes(archive, is_stream=True) as stream, tarfile.open(fileobj=stream, mode="r|*") as members:
            for member in members:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in wanted and name not in found:
                    found[name] = list(_records(members.extractfile(member), name, redact(archive)))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{redact(archive)} must be WikiSQL's data.tar.bz2, but cannot be read ({one_line(error)}); fetch it again"
        ) from error
    return found


def _records(file: Any, name: str, archive: str) -> Iterator[tuple[dict[str, Any], str]]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        try:
            yield parse_object(line), f"{name}:{number}"
        except ValueError as error:
            raise DataError(
                f"{archive}: {name}:{number} must be one JSON object, but is not ({one_line(error)}); fetch it again"
            ) from error
