"""How much of the text each job has drawn, by source, and how often it has seen each document."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from modularforge.observe.run import Run
from modularforge.observe.table import Column, Table, count, decimals, percent

MOST_ROWS = 200
Count = Annotated[int, Field(strict=True, ge=0, le=2**63)]
Share = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
WORDS = (
    "Sequences are counted for the source that they begin in. Seen is how often each document of a source was read, in "
    "the mean: a source comes whole before any of it comes again, so each was read that often, rounded up or down."
)
EVEN = "Without data.mix, each text is drawn once an epoch."


class _Drawn(BaseModel):
    model_config = ConfigDict(extra="ignore")

    windows: Count
    share: Share
    epochs: Share
    job: str = ""
    source: str = ""


class _Amount(BaseModel):
    tokens: Count


class _Copies(BaseModel):
    dropped: Count
    left: Count


_MIXTURE = TypeAdapter(dict[str, _Drawn])
_LABELS = TypeAdapter(dict[str, _Amount])


def drawn_table(run: Run) -> Table | None:
    """A record for each source of each job that has been trained on text; None where nothing is known."""
    found = list(_drawn(run))
    columns = [
        Column("job", attrgetter("job"), is_text=True),
        Column("source", attrgetter("source"), is_text=True),
        Column("sequences", attrgetter("windows"), count),
        Column("share", attrgetter("share"), percent),
        Column("seen", attrgetter("epochs"), lambda times: f"{decimals(2)(times)} times"),
    ]
    said = [WORDS, *([] if len(found) > 1 else [EVEN]), *_copies(run)]
    more = [f"{len(found) - MOST_ROWS:,} more rows are not shown."] if len(found) > MOST_ROWS else []
    return Table(columns, found[:MOST_ROWS], "What was drawn", " ".join([*said, *more])) if found else None


def _drawn(run: Run) -> Iterator[_Drawn]:
    names = ["backbone", *(f"expert-{index}" for index in range(run.num_experts))]
    for name in (name for name in names if name in run.artifacts):
        facts = run.artifacts[name].manifest.facts
        mixture = _checked(_MIXTURE, facts.get("mixture"))
        if mixture:
            yield from (row.model_copy(update={"job": name, "source": source}) for source, row in mixture.items())
        elif name == "backbone" and (row := _of_all(run, facts)):
            yield row


def _of_all(run: Run, facts: dict[str, Any]) -> _Drawn | None:
    """What a backbone without a mixture has drawn of its only stream."""
    corpus, tokens = run.artifacts.get("prepare-data"), facts.get("training_tokens")
    splits = corpus.manifest.facts.get("splits") if corpus else None
    labels = _checked(_LABELS, splits.get("train")) if isinstance(splits, dict) else None
    whole, length = sum(row.tokens for row in (labels or {}).values()), run.setting("model.context_length", 0)
    if not whole or not length or type(tokens) is not int or not 0 <= tokens < 2**63:
        return None
    return _Drawn(windows=tokens // length, share=1.0, epochs=tokens / whole, job="backbone", source="all")


def _copies(run: Run) -> Iterator[str]:
    """In words, how many training documents were like held-out ones."""
    corpus = run.artifacts.get("prepare-data")
    found = _checked(TypeAdapter(_Copies), corpus.manifest.facts.get("near_copies")) if corpus else None
    if found:
        yield (
            f"{found.dropped:,} training documents were near duplicates of held-out ones and left out; {found.left:,} "
            "are near duplicates of one in named validation or test files."
        )


def _checked(kind: TypeAdapter[Any], value: Any) -> Any:
    """What a manifest says, or None where it is something else."""
    try:
        return kind.validate_python(value) if value else None
    except ValidationError:
        return None
