"""Rows of a data set of the Hugging Face Hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modularforge.config import SourceConfig
from modularforge.data.records import Labelled, fields
from modularforge.errors import DataError, UserError, one_line

ANSWER_SECONDS = 5.0


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


def require_hub(source: SourceConfig) -> None:
    """Raise DataError at once where the Hub does not answer; the libraries ask for half a minute before they say so."""
    if source.hub is None or Path(source.hub).exists():
        return
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # its HTTP client has changed from version to version, and each has its own classes
        raise DataError(
            f"{source.hub} must be a data set that the Hugging Face Hub gives, but it does not answer "
            f"({one_line(error)}); check the network, name files, or set HF_HUB_OFFLINE=1 if its cache has the data set"
        ) from error
