"""What cleaning did to the corpus, for the page: by step and source, and texts that were dropped or changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from checkpoints.parsing import parse_object
from modularforge.errors import DataError
from modularforge.observe.table import Column, Table, listing

REPORT_NAME = "cleaning.json"
SHOWN_REASONS, SHOWN_SAMPLES = 3, 40
Count = Annotated[int, Field(ge=0, le=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Counts(_Part):
    """What one step did to one source."""

    place: Count
    step: str
    source: str
    documents: Count
    dropped: Count
    dropped_bytes: Count
    changed: Count
    reasons: dict[str, Count]


class Sample(_Part):
    """A text that a step dropped, for a reason, or changed; `label` is its domain where that is not the source."""

    place: Count
    source: str
    label: str | None = None
    reason: str | None
    before: str
    after: str | None


class Copies(_Part):
    """What a step that looks for copies found."""

    step: str
    removed: Count
    shared_with_held_out: Count | None = None
    still_shared: Count | None = None


class Amount(_Part):
    """How much text there is."""

    documents: Count = 0
    bytes: Count = 0


class Cleaning(_Part):
    """cleaning.json."""

    counts: list[Counts]
    samples: list[Sample]
    copies: list[Copies]
    read: dict[str, dict[str, Amount]]
    kept: dict[str, dict[str, Amount]]


def parse_cleaning(content: bytes, origin: str) -> Cleaning:
    """cleaning.json; raises DataError. `origin` names it."""
    try:
        return Cleaning.model_validate(parse_object(content))
    except (ValidationError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise DataError(
            f"{origin} must say what cleaning did, but cannot be read ({said:.80}); delete its folder and run "
            "prepare-data again"
        ) from error


def cleaning_tables(cleaning: Cleaning | None) -> Iterator[Table]:
    """How much is left of each source, and what each step did."""
    if cleaning is None:
        return
    yield listing(
        ["source", "read", "kept", "MB read", "MB kept"],
        [list(_amounts(cleaning, source)) for source in cleaning.read],
        title="What is left",
        words="Documents of all splits.",
    )
    yield Table(_COLUMNS, cleaning.counts, "What each step did", _across(cleaning))


def cleaning_samples(cleaning: Cleaning | None) -> Iterator[dict[str, Any]]:
    """Texts to look at, with the step and why."""
    for sample in (cleaning.samples if cleaning else [])[:SHOWN_SAMPLES]:
        steps = {row.place: row.step for row in cleaning.counts} if cleaning else {}
        yield {**sample.model_dump(), "step": steps.get(sample.place, "")}


def _amounts(cleaning: Cleaning, source: str) -> Iterator[str]:
    found = [_sum(cleaning.read[source]), _sum(cleaning.kept.get(source, {}))]
    yield source
    yield from (f"{amount.documents:,}" for amount in found)
    yield from (f"{amount.bytes / 1e6:,.1f}" for amount in found)


def _sum(splits: dict[str, Amount]) -> Amount:
    return Amount(
        documents=sum(amount.documents for amount in splits.values()),
        bytes=sum(amount.bytes for amount in splits.values()),
    )


def _across(cleaning: Cleaning) -> str:
    """In words, what of the copies lay in training and held out."""
    sentences = ["A step looks at what those before it left."]
    for copies in (copies for copies in cleaning.copies if copies.still_shared is not None):
        sentences.append(
            f"Of {copies.removed:,} {copies.step} copies, {copies.shared_with_held_out:,} were training documents like "
            f"one that is held out; {copies.still_shared:,} such pairs are left."
        )
    return " ".join(sentences)


def _reasons(row: Counts) -> str:
    found = [f"{reason} {number:,}" for reason, number in list(row.reasons.items())[:SHOWN_REASONS]]
    return ", ".join(found) + (", …" if len(row.reasons) > SHOWN_REASONS else "")


_COLUMNS = [
    Column("step", lambda row: f"{row.place + 1} {row.step}", is_text=True),
    Column("source", lambda row: row.source, is_text=True),
    Column("why", _reasons, is_text=True),
    Column("documents", lambda row: row.documents, "{:,}".format),
    Column("dropped", lambda row: row.dropped, "{:,}".format),
    Column("of them", lambda row: row.dropped / row.documents if row.documents else None, "{:.1%}".format),
    Column("MB dropped", lambda row: row.dropped_bytes / 1e6, "{:,.2f}".format),
    Column("changed", lambda row: row.changed, "{:,}".format),
]
