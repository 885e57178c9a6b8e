"""What ``metadata.json`` of prepared data and ``partitions.json`` say, checked before anybody computes with it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from checkpoints.parsing import parse_object
from modularforge.data.token_files import LABEL_LIMIT
from modularforge.data.tokenizer import EOS, MAX_VOCABULARY
from modularforge.errors import DataError, one_line

Count = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    """Entries that we read; others are allowed, and kept."""

    model_config = ConfigDict(extra="ignore", strict=True)


class CorpusMetadata(_Section):
    """Of prepared data."""

    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    end_token: int = Field(EOS, ge=0, lt=MAX_VOCABULARY)
    labels: list[str] = Field(max_length=LABEL_LIMIT)


class PartitionRow(_Section):
    """Of one partition."""

    documents: Count
    tokens: Count
    tokens_by_label: dict[str, Count]
    top_words: list[str] = []


class PartitionsSummary(_Section):
    """Of all partitions."""

    partitions: list[PartitionRow]


S = TypeVar("S", bound=_Section)


def check_metadata(content: bytes, origin: str) -> dict[str, Any]:
    """metadata.json of prepared data; raises DataError. `origin` names it."""
    return _checked(CorpusMetadata, content, origin)[0]


def read_partitions(content: bytes, origin: str) -> list[PartitionRow]:
    """The rows of partitions.json; raises DataError."""
    return _checked(PartitionsSummary, content, origin)[1].partitions


def _checked(kind: type[S], content: bytes, origin: str) -> tuple[dict[str, Any], S]:
    try:
        values = parse_object(content)
        return values, kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"])
        reason = f"{name}: {found['msg']}"
    except ValueError as error:
        reason = str(error)
    raise DataError(
        f"{origin} must say what was prepared, but cannot be read ({one_line(reason)}); run prepare-data again in "
        "another place"
    )
