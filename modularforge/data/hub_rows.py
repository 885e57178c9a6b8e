"""Rows of a data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator

from modularforge.config import SourceConfig
from modularforge.data.records import Labelled, fields
from modularforge.errors import DataError, UserError, one_line


def hub_rows(split: str, source: SourceConfig) -> Iterator[Labelled]:
    """Text and label of the rows of one split; raises DataError."""
    from datasets import load_dataset

    origin = f"{source.hub} ({split})"
    try:
        rows = load_dataset(source.hub, source.hub_config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield fields(row, source, f"{origin}, row {number}")
    except UserError:
        raise
    except Exception as error:  # data sets, Arrow and HTTP clients each have their own classes
        raise DataError(
            f"{origin} must be a data set of the Hugging Face Hub, but cannot be read ({one_line(error)}); "
            f"check hub, hub_config and split of source {source.name}, and the network"
        ) from error
