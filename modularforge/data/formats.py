"""Text, WikiText, JSONL and Parquet files, and rows of Hub data sets, as streams of documents.

Every reader is a generator of (text, label or None) that holds one document, or one chunk of a file, at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from checkpoints.redact import redact
from modularforge.config import SourceConfig
from modularforge.data.compression import compression_of
from modularforge.data.cutting import split_articles, split_pieces
from modularforge.data.files import read_lines, read_text
from modularforge.data.hub_rows import hub_rows
from modularforge.data.parquet import parquet_rows
from modularforge.data.patterns import file_part
from modularforge.data.records import Labelled, fields, wanted_fields
from modularforge.errors import DataError, one_line
from modularforge.log import logger

FORMAT_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    # The names of the WikiText releases: wiki.train.tokens, wiki.train.raw.
    ".tokens": "wikitext",
    ".raw": "wikitext",
}


def read_file(url: str, source: SourceConfig) -> Iterator[Labelled]:
    """The documents of one file; raises DataError naming file and line of what is not as its format says."""
    is_said = False
    for number, (text, label) in enumerate(_READERS[_format_of(url, source)](url, source), start=1):
        if not is_said and "\0" in text:
            logger.warning("%s has NULs in its text, first in document %d; they are kept", redact(url), number)
            is_said = True
        yield text, label


def read_hub(split: str, source: SourceConfig) -> Iterator[Labelled]:
    """The documents of one split of a Hub data set, streamed; WikiText rows are lines and become articles."""
    rows = hub_rows(split, source)
    if source.format == "wikitext" or (source.format == "auto" and "wikitext" in str(source.hub).lower()):
        lines = (line for text, _ in rows for line in text.removesuffix("\n").split("\n"))
        return ((article, None) for article in split_articles(lines, f"{source.hub} ({split})"))
    return rows


def _format_of(url: str, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    name = file_part(url).lower().removesuffix(compression_of(url) or "")
    return next((kind for ending, kind in FORMAT_BY_ENDING.items() if name.endswith(ending)), "text")


def _read_plain(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return ((piece, None) for piece in split_pieces(read_text(url)))


def _read_wikitext(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return ((article, None) for article in split_articles(read_lines(url), redact(url)))


def _read_jsonl(url: str, source: SourceConfig) -> Iterator[Labelled]:
    name = redact(url)
    for number, line in enumerate(read_lines(url), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number} must be one JSON object, but is not ({one_line(error)}); mend the line, or write one "
                "object a line (jq -c)"
            ) from error
        yield fields(record, source, f"{name}:{number}")


def _read_parquet(url: str, source: SourceConfig) -> Iterator[Labelled]:
    name, wanted = redact(url), wanted_fields(source)
    for number, record in enumerate(parquet_rows(url, wanted), start=1):
        yield fields(record, source, f"{name}, row {number}")


_READERS: dict[str, Callable[[str, SourceConfig], Iterator[Labelled]]] = {
    "text": _read_plain,
    "wikitext": _read_wikitext,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
