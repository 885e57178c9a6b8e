"""Rows of Parquet files, a batch at a time; what cannot be read is named with its row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from checkpoints.redact import redact
from modularforge.data.content import describe
from modularforge.data.opening import open_bytes
from modularforge.data.records import require_columns
from modularforge.errors import DataError, one_line

BATCH_ROWS = 256


def parquet_rows(url: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The wanted columns of all rows; raises DataError."""
    import pyarrow
    import pyarrow.parquet

    name, first = redact(url), 1
    with open_bytes(url) as file:
        _require_parquet(file, name)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            require_columns(columns, table.schema_arrow.names, name)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from _records(batch, first, name)
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            said = one_line(redact(str(error)))
            raise DataError(
                f"{name} must be a Parquet file, but cannot be read after row {first - 1} ({said}); write it again, or "
                "copy it to a folder if its server gives no ranges"
            ) from error


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
