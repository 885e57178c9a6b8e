"""What the rounds of a run have cost, in bytes and in waiting, beside what the experts had reached by their ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from modularforge.observe.run import Run
from modularforge.observe.table import Column, Table, duration, fixed
from modularforge.pipeline import made_in_round

WORDS = (
    "At the end of each round but the last, what all experts share was merged. Read and written are the bytes of that; "
    "between rounds an expert also keeps its own state. Waiting is from the end of an expert's round to the merge, of "
    "the one that was first and of all together. The loss is that of the experts on held-out text of their domains, "
    "in the mean."
)


@dataclass(frozen=True)
class Round:
    """One round; what is not known, or not done at the end of the last, is None."""

    name: str
    experts: str
    loss: float | None
    read: int | None = None
    written: int | None = None
    kept: int | None = None
    first: float | None = None
    waited: float | None = None
    seconds: float | None = None


def rounds_table(run: Run) -> Table | None:
    """A record for each round that has been merged, and one for the last; None where there are none."""
    found = list(_rounds(run))
    columns = [
        Column("round", attrgetter("name"), is_text=True),
        Column("experts", attrgetter("experts")),
        Column("loss", attrgetter("loss"), fixed),
        Column("read", attrgetter("read"), _megabytes),
        Column("written", attrgetter("written"), _megabytes),
        Column("own states", attrgetter("kept"), _megabytes),
        Column("first waited", attrgetter("first"), duration),
        Column("all waited", attrgetter("waited"), duration),
        Column("merged in", attrgetter("seconds"), duration),
    ]
    return Table(columns, found, "Rounds", WORDS) if len(found) > 1 else None


def _rounds(run: Run) -> Iterator[Round]:
    count, last = run.num_experts, run.setting("experts.rounds", 1)
    for number in range(1, last):
        stage, merge = made_in_round(number)
        members, artifact = _members(run, stage), run.artifacts.get(merge)
        if artifact is None:
            continue
        facts, own = artifact.manifest.facts, sum(item.manifest.size for item in members)
        merged = facts.get("merged")
        known = {name: _number(facts.get(name)) for name in ("bytes_read", "bytes_written", "seconds")}
        waits = _number(facts.get("longest_wait_seconds")), _number(facts.get("waited_seconds"))
        said = f"{len(merged) if isinstance(merged, list) else 0} of {count}"
        read, written = known["bytes_read"], known["bytes_written"]
        yield Round(str(number), said, _loss(members), read, written, own, *waits, known["seconds"])
    if members := _members(run, "expert"):
        yield Round(f"{last} (last)", f"{len(members)} of {count}", _loss(members))


def _members(run: Run, stage: str) -> list[Any]:
    return [run.artifacts[name] for k in range(run.num_experts) if (name := f"{stage}-{k}") in run.artifacts]


def _loss(members: list[Any]) -> float | None:
    losses = [_number(item.manifest.facts.get("validation_loss")) for item in members]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


def _number(value: Any) -> Any:
    """A recorded number; None for what is none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
