"""One record of JSONL, Parquet or a Hub data set as a text and its label, checked; raises DataError.

Labels name domains, experts and rows of reports, so they are checked as texts are. A missing value (null, NaN or an
empty text) leaves the document to the source's `name`; numbers, booleans and dates become the text Python writes for
them; lists and objects are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from checkpoints.urls import has_control_characters
from modularforge.config import SourceConfig
from modularforge.errors import DataError, one_line

Labelled = tuple[str, str | None]
# Of somebody who names the column with the text, the first document would be a label.
LABEL_CHARACTERS = 200


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
    if not isinstance(record, Mapping):
        raise DataError(
            f"{origin} must be a JSON object, but is a {type(record).__name__}; write one object a line (jq -c)"
        )
    require_columns(wanted_fields(source), record, origin)
    text = record[source.text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{origin} must have text in column {source.text_field}, but has {type(text).__name__}; "
            f"mend the record or set text_field of source {source.name}"
        )
    if not _is_unicode(text):
        raise DataError(f"{origin} must hold Unicode text, but has half of a surrogate pair; mend the record")
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
        f"characters, but {found}; mend the record or set label_field of source {source.name}"
    )


@functools.lru_cache(maxsize=4096)
def _is_label(text: str) -> bool:
    return len(text) <= LABEL_CHARACTERS and not has_control_characters(text)


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON escapes such as \\ud800 alone cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
