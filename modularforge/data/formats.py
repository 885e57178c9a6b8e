"""Text, WikiText, JSONL, Parquet, web archives and ids, and rows of Hub data sets, as streams of documents.

Every reader is a generator of (text, label or None) that holds one document, or one chunk of a file, at a time.
Every record becomes a text and its label, checked; what cannot be read is named with its line or row. Labels name
domains, experts and rows of reports, so they are checked as texts are. A missing value (null, NaN or an empty text)
leaves the document to the source's `name`; numbers, booleans and dates become the text Python writes for them; lists
and objects are refused.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from checkpoints.redact import redact
from checkpoints.urls import has_control_characters
from modularforge.config import SourceConfig
from modularforge.data.compression import compression_of, describe
from modularforge.data.cutting import split_articles, split_pieces
from modularforge.data.files import Span, lines_before, open_bytes, read_lines, read_text
from modularforge.data.patterns import file_part, is_web
from modularforge.data.token_arrays import FORMATS, read_tokens
from modularforge.data.web_archive import read_archive
from modularforge.errors import DataError, UserError, one_line
from modularforge.log import logger

FORMAT_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    # The names of the WikiText releases: wiki.train.tokens, wiki.train.raw.
    ".tokens": "wikitext",
    ".raw": "wikitext",
    ".warc": "warc",
    ".wet": "warc",
    ".idx": "megatron",
    ".npy": "npy",
}
CSV_ENDING = ".csv"
Labelled = tuple[str, str | None]
# Of somebody who names the column with the text, the first document would be a label.
LABEL_CHARACTERS = 200
BATCH_ROWS = 256


def read_file(url: str, source: SourceConfig, span: Span | None = None) -> Iterator[Labelled]:
    """The documents of one file; raises DataError naming file and line of what is not as its format says.

    Of a file that `is_divisible`, `span` gives those that begin in these bytes.
    """
    is_said, kind = False, _format_of(url, source)
    found = _READERS[kind](url, source) if span is None else _SPAN_READERS[kind](url, source, span)
    for number, (text, label) in enumerate(found, start=1):
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
    sizes = (source.piece_characters, source.piece_characters // 2) if source.piece_characters else ()
    return ((piece, None) for piece in split_pieces(read_text(url), *sizes))


def _read_wikitext(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return ((article, None) for article in split_articles(read_lines(url), redact(url)))


def _read_jsonl(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return (fields(record, source, origin) for record, origin in json_records(read_lines(url), redact(url)))


def is_divisible(url: str, source: SourceConfig) -> bool:
    """Whether parts of a file can be read alone."""
    return _format_of(url, source) in _SPAN_READERS and compression_of(url) is None and not is_web(url)


def _jsonl_within(url: str, source: SourceConfig, span: Span) -> Iterator[Labelled]:
    """The records of lines that begin in a span; a mistake is read once more, with the number of its line."""
    given = 0
    try:
        for record, origin in json_records(read_lines(url, span), redact(url)):
            found = fields(record, source, origin)
            given += 1
            yield found
    except DataError:
        lines, first = read_lines(url, span), lines_before(url, span[0]) + 1
        again = (fields(record, source, origin) for record, origin in json_records(lines, redact(url), first))
        next(itertools.islice(again, given, None), None)
        raise


def _parquet_within(url: str, source: SourceConfig, span: Span) -> Iterator[Labelled]:
    """The rows of groups that begin in a span."""
    records = _parquet_records(url, wanted_fields(source), span=span)
    return (fields(record, source, origin) for record, origin in records)


def json_records(lines: Iterable[str], name: str, first: int = 1) -> Iterator[tuple[Any, str]]:
    """The value of each line of a file of this name, and what names the line; raises DataError."""
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number} must be one JSON object, but is not ({one_line(error)}); fix the line, or write one "
                "object a line (jq -c)"
            ) from error
        yield record, f"{name}:{number}"


def _read_parquet(url: str, source: SourceConfig) -> Iterator[Labelled]:
    return (fields(record, source, origin) for record, origin in _parquet_records(url, wanted_fields(source)))


def _parquet_records(
    url: str, wanted: list[str], needs_all: bool = True, span: Span | None = None
) -> Iterator[tuple[Any, str]]:
    """Each row's wanted columns, and what names the row."""
    for number, record in numbered_rows(url, wanted, needs_all, span):
        yield record, f"{redact(url)}, row {number}"


def read_records(url: str, source: SourceConfig, columns: list[str]) -> Iterator[tuple[Any, str]]:
    """The records of a file of JSON lines or of Parquet, each with what names it; raises DataError."""
    kind = _record_format(url, source)
    if kind == "csv":
        return csv_records(read_lines(url), redact(url))
    if kind == "parquet":
        return _parquet_records(url, [*columns, source.label_field] if source.label_field else columns, False)
    if kind == "jsonl":
        return json_records(read_lines(url), redact(url))
    raise DataError(
        f"{redact(url)} must hold records with a prompt and a response, as JSON lines, CSV or Parquet, but is taken "
        f"for {kind}; set the format of source {source.name}, or write it as JSON lines"
    )


def _record_format(url: str, source: SourceConfig) -> str:
    """The format of a file of records; a CSV file may be read as plain text, but its records may be examples."""
    found, name = _format_of(url, source), file_part(url).lower().removesuffix(compression_of(url) or "")
    is_csv = name.endswith(CSV_ENDING) and source.format == "auto"
    return "csv" if is_csv else found


def csv_records(lines: Iterable[str], name: str) -> Iterator[tuple[Any, str]]:
    """Each row by the names of the first one, and what names the row in a file of this name; raises DataError."""
    reader = csv.DictReader((f"{line}\n" for line in lines), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise csv.Error(f"it has not the {len(reader.fieldnames or ())} fields of the first line")
            yield record, f"{name}:{reader.line_num}"
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num} must be a row of CSV with commas, but is not ({error}); fix the row, or write "
            "JSON lines"
        ) from error


def label_of(record: Any, source: SourceConfig, origin: str) -> str | None:
    """The label of a record, or None where there is none; raises DataError."""
    if source.label_field is None:
        return None
    require_object(record, origin)
    require_columns([source.label_field], record, origin)
    return _label(record[source.label_field], source, origin)


_READERS: dict[str, Callable[[str, SourceConfig], Iterator[Labelled]]] = {
    "text": _read_plain,
    "wikitext": _read_wikitext,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "warc": read_archive,
    **{kind: functools.partial(read_tokens, kind=kind) for kind in FORMATS},
}
_SPAN_READERS: dict[str, Callable[[str, SourceConfig, Span], Iterator[Labelled]]] = {
    "jsonl": _jsonl_within,
    "parquet": _parquet_within,
}


def wanted_fields(source: SourceConfig) -> list[str]:
    """The columns of a record that are read."""
    return [name for name in (source.text_field, source.label_field) if name]


def require_columns(wanted: list[str], existing: Iterable[Any], origin: str) -> None:
    """Raise DataError when a column is not there; `origin` names file and place."""
    existing = existing if isinstance(existing, Mapping) else list(existing)
    for name in wanted:
        if name not in existing:
            found = one_line(", ".join(map(str, existing)) or "none")
            raise DataError(
                f"{origin} must have a column {name}, but has {found}; "
                "set text_field or label_field of this source to one of them"
            )


def fields(record: Any, source: SourceConfig, origin: str) -> Labelled:
    """Text and label of one record; without a label None."""
    require_object(record, origin)
    require_columns(wanted_fields(source), record, origin)
    text = record[source.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{origin} must have text in column {source.text_field}, but has {type(text).__name__}; "
            f"fix the record or set text_field of source {source.name}"
        )
    require_unicode(text, origin)
    return text, None if source.label_field is None else _label(record[source.label_field], source, origin)


def _label(value: Any, source: SourceConfig, origin: str) -> str | None:
    if value is None or value != value:  # NaN is what tables write for a missing value
        return None
    if isinstance(value, Mapping | list | tuple | bytes):
        found = f"has {type(value).__name__}"
    else:
        label = str(value)
        if _is_label(label):
            return label
        found = f"has {label!r:.80}" + (f" of {len(label)} characters" if len(label) > LABEL_CHARACTERS else "")
    raise DataError(
        f"{origin} must have a label of one line in column {source.label_field}, of at most {LABEL_CHARACTERS} "
        f"characters, but {found}; fix the record or set label_field of source {source.name}"
    )


@functools.lru_cache(maxsize=4096)
def _is_label(text: str) -> bool:
    return len(text) <= LABEL_CHARACTERS and not has_control_characters(text)


def require_object(record: Any, origin: str) -> None:
    """Raise DataError when a record has no fields; `origin` names file and place."""
    if not isinstance(record, Mapping):
        raise DataError(
            f"{origin} must be a JSON object, but is a {type(record).__name__}; write one object a line (jq -c)"
        )


def require_unicode(text: str, origin: str) -> None:
    """Raise DataError when a text cannot be written as UTF-8, as JSON escapes such as \\ud800 alone cannot."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin} must hold Unicode text, but has half of a surrogate pair; fix the record") from error


def hub_rows(split: str, source: SourceConfig) -> Iterator[Labelled]:
    """Text and label of the rows of one split; raises DataError."""
    return (fields(record, source, origin) for record, origin in hub_records(split, source))


def hub_records(split: str, source: SourceConfig) -> Iterator[tuple[Any, str]]:
    """The rows of one split, their audio as bytes, each with what names it; raises DataError."""
    from datasets import load_dataset

    origin = f"{source.hub} ({split})"
    try:
        rows = load_dataset(source.hub, source.hub_config, split=split, streaming=True)
        for number, row in enumerate(undecoded(rows), start=1):
            yield row, f"{origin}, row {number}"
    except UserError:
        raise
    except Exception as error:  # data sets, Arrow and HTTP clients each have their own classes
        raise DataError(
            f"{origin} must be a data set of the Hugging Face Hub, but cannot be read ({one_line(error)}); "
            f"check hub, hub_config and split of source {source.name}, and the network (`modularforge run-all --config "
            "configs/quickstart.yaml` needs none)"
        ) from error


def undecoded(rows: Any) -> Any:
    """A data set of `datasets` whose audio columns give the bytes of a file, or its path, instead of samples."""
    from datasets import Audio

    for name, feature in dict(getattr(rows, "features", None) or {}).items():
        if isinstance(feature, Audio):
            rows = rows.cast_column(name, Audio(decode=False))
    return rows


def parquet_rows(url: str, columns: list[str], needs_all: bool = True) -> Iterator[dict[str, Any]]:
    """The wanted columns of all rows, or those of them that there are; raises DataError."""
    return (record for _, record in numbered_rows(url, columns, needs_all))


def numbered_rows(
    url: str, columns: list[str], needs_all: bool = True, span: Span | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same with the number of each, from 1; with a span, of the groups of rows that begin in these bytes."""
    import pyarrow
    import pyarrow.parquet

    name, first = redact(url), 1
    with open_bytes(url) as file:
        _require_parquet(file, name)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if needs_all:
                require_columns(columns, table.schema_arrow.names, name)
            columns = [column for column in columns if column in table.schema_arrow.names]
            if twice := [column for column in columns if table.schema_arrow.names.count(column) > 1]:
                raise DataError(f"{name} must have one column {twice[0]}, but has several; write it again with one")
            groups = None if span is None else _groups_within(table.metadata, span)
            first += sum(table.metadata.row_group(group).num_rows for group in range(groups[0] if groups else 0))
            batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=columns)
            for batch in batches if groups != [] else ():
                yield from enumerate(_records(batch, first, name), start=first)
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            said = one_line(redact(str(error)))
            raise DataError(
                f"{name} must be a Parquet file, but cannot be read after row {first - 1} ({said}); write it again, or "
                "copy it to a folder if its server gives no ranges"
            ) from error


def _groups_within(metadata: Any, span: Span) -> list[int]:
    """The groups of rows whose first byte is in a span; they lie one after another."""
    starts = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(k) for k in range(metadata.num_columns)]
        starts.append(min(column.dictionary_page_offset or column.data_page_offset for column in columns))
    return [group for group, start in enumerate(starts) if span[0] <= start < span[1]]


def _require_parquet(file: Any, name: str) -> None:
    head = file.read(512)
    file.seek(0)
    if head[:4] != b"PAR1":
        what, advice = describe(head) or ("text" if head else "empty", "set the format of this source")
        raise DataError(f"{name} must be a Parquet file, but is {what}; {advice}")


def _records(batch: Any, first: int, name: str) -> list[dict[str, Any]]:
    """The rows of a batch; Arrow does not look whether bytes called text are UTF-8."""
    try:
        found: list[dict[str, Any]] = batch.to_pylist()
        return found
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, row {first + row} must hold UTF-8 text, but byte {error.start} of it is "
                    f"0x{error.object[error.start]:02x}; write the file again with its text in UTF-8"
                ) from error
        raise
