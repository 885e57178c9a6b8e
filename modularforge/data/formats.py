"""Text, WikiText, JSONL and Parquet files, and rows of Hub data sets, as streams of documents.

Every reader is a generator of (text, label or None) that holds one document, or one chunk of a file, at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modularforge.config import SourceConfig
from modularforge.data.cutting import split_articles, split_pieces
from modularforge.data.files import compression_of, open_bytes, read_lines, read_text
from modularforge.errors import DataError

Labelled = tuple[str, str | None]

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
    return _READERS[_format_of(url, source)](url, source)


def read_hub(split: str, source: SourceConfig) -> Iterator[Labelled]:
    """The documents of one split of a Hub data set, streamed; WikiText rows are lines and become articles."""
    rows = _hub_rows(split, source)
    if source.format == "wikitext" or (source.format == "auto" and "wikitext" in str(source.hub).lower()):
        lines = (line for text, _ in rows for line in text.removesuffix("\n").split("\n"))
        return ((article, None) for article in split_articles(lines, f"{source.hub} ({split})"))
    return rows


def _format_of(url: str, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    name = url.lower().removesuffix(compression_of(url) or "")
    return next((kind for ending, kind in FORMAT_BY_ENDING.items() if name.endswith(ending)), "text")


def _read_plain(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return ((piece, None) for piece in split_pieces(read_text(url)))


def _read_wikitext(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return ((article, None) for article in split_articles(read_lines(url), url))


def _read_jsonl(url: str, source: SourceConfig) -> Iterator[Labelled]:
    for number, line in enumerate(read_lines(url), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{url}:{number} must be one JSON object, but is not ({error}); mend the line") from error
        yield _fields(record, source, f"{url}:{number}")


def _read_parquet(url: str, source: SourceConfig) -> Iterator[Labelled]:
    import pyarrow
    import pyarrow.parquet

    wanted = [name for name in (source.text_field, source.label_field) if name]
    with open_bytes(url) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _require_columns(wanted, table.schema_arrow.names, url)
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    yield _fields(record, source, url)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{url} must be a Parquet file, but cannot be read ({error}); write it again") from error


def _hub_rows(split: str, source: SourceConfig) -> Iterator[Labelled]:
    from datasets import load_dataset

    origin = f"{source.hub} ({split})"
    try:
        for row in load_dataset(source.hub, source.hub_config, split=split, streaming=True):
            yield _fields(row, source, origin)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"{origin} must be a data set of the Hugging Face Hub, but cannot be read ({error}); "
            f"check hub, hub_config and split of source {source.name}, and the network"
        ) from error


def _fields(record: Any, source: SourceConfig, origin: str) -> Labelled:
    if not isinstance(record, Mapping):
        raise DataError(f"{origin} must be a JSON object, but is a {type(record).__name__}; write one object a line")
    wanted = [name for name in (source.text_field, source.label_field) if name]
    _require_columns(wanted, list(record), origin)
    text = record[source.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{origin} must have text in column {source.text_field}, but has {type(text).__name__}; "
            f"mend the record or set text_field of source {source.name}"
        )
    if not _is_unicode(text):
        raise DataError(f"{origin} must hold Unicode text, but has half of a surrogate pair; mend the record")
    return text, None if source.label_field is None else str(record[source.label_field])


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON escapes such as \\ud800 alone cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _require_columns(wanted: list[str], existing: list[str], origin: str) -> None:
    for name in wanted:
        if name not in existing:
            raise DataError(
                f"{origin} must have a column {name}, but has {', '.join(map(str, existing)) or 'none'}; "
                "set text_field or label_field of this source to one of them"
            )


_READERS: dict[str, Callable[[str, SourceConfig], Iterator[Labelled]]] = {
    "text": _read_plain,
    "wikitext": _read_wikitext,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
