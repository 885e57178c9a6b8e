"""Between two rounds of experts: make one of what all have made of the weights that they share, streamed."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

from checkpoints import Artifact, ArtifactWriter
from checkpoints.errors import MissingArtifactError
from modularforge.assembly.plan import spans_of
from modularforge.assembly.shared import (
    MOMENTUM_NAME,
    SHARED_NAME,
    Sums,
    backbone_spans,
    chunks,
    means,
    outer_step,
    size_of,
)
from modularforge.config import OuterConfig
from modularforge.log import logger
from modularforge.pipeline import JobName, made_in_round
from modularforge.provenance import commit, making
from modularforge.routing.text_counts import token_occurrences
from modularforge.run import Run

SECONDS_BETWEEN_LOOKS = 30.0


def run(run: Run, number: int) -> Artifact:
    """Merge what experts share at the end of a round, counted from 1, and commit it, unless it is done.

    An expert whose round is not finished is left out, where there are `cluster.min_experts` others, and joins later.
    """
    stages = made_in_round(number)
    wait_for_enough(run, number)
    plan = run.plan(stages[1])
    if found := run.finished(plan):
        logger.info("%s is finished: %s", stages[1], plan.url)
        return found
    indices, start = list(run.merged_experts(number)), time.time()
    chosen = dict(zip(indices, run.require_each(stages[0], indices), strict=True))
    late = [index for index in range(run.config.experts.count) if index not in chosen]
    if late:
        logger.warning(
            "%s goes on without %s, which are late or have failed; they join the round after the one they finish",
            stages[1],
            ", ".join(str(JobName("expert", index)) for index in late),
        )
    with making(plan) as writer:
        facts = _write(run, number, list(chosen.values()), writer)
        waited = waiting(list(chosen.values()), start)
        facts |= {"merged": list(chosen), "late": late, **waited, "seconds": round(time.time() - start, 3)}
        logger.info("%s: %s", stages[1], cost(facts))
        return commit(writer, plan, run, facts)


def wait_for_enough(run: Run, number: int) -> None:
    """Wait for the experts without which nothing is merged, as long again as the merge has waited for stragglers.

    Slurm starts a merge at a time, however many have ended then; the launcher on this machine does not.
    """
    end, minutes = time.monotonic(), run.config.cluster.straggler_minutes
    end += 60 * (minutes or 0)
    while True:
        try:
            run.merged_experts(number)
            return
        except MissingArtifactError as error:
            if time.monotonic() >= end:
                raise
            logger.info("%s; it is waited for", error)
            time.sleep(min(SECONDS_BETWEEN_LOOKS, max(0.0, end - time.monotonic())))
            run.look_again()


def _write(run: Run, number: int, experts: Sequence[Artifact], writer: ArtifactWriter) -> dict[str, Any]:
    """Write the merged weights, and the momentum where there is one; says how many bytes were read and written."""
    settings = run.config.experts.outer
    before = run.require(made_in_round(number - 1)[1]) if number > 1 else None
    base = backbone_spans(run.require("backbone")) if before is None else spans_of(before, SHARED_NAME)
    weighting = run.config.assembly.shared
    files: dict[str, Sums] = {SHARED_NAME: means(base, experts, weighting, token_occurrences)}
    if settings != OuterConfig():
        momentum = spans_of(before, MOMENTUM_NAME) if before else {}
        weights, momenta = outer_step(files[SHARED_NAME], base, momentum, settings)
        files = {SHARED_NAME: weights, MOMENTUM_NAME: momenta}
    for name, sums in files.items():
        types = dict.fromkeys(sums, "F32")
        writer.require_space(size_of(sums, types))
        writer.write_chunks(name, chunks(sums, types), size_of(sums, types))
    read = sum(expert.entry(SHARED_NAME).size for expert in experts)
    return {"bytes_read": read * len(files), "bytes_written": sum(entry.size for entry in writer.written.values())}


def waiting(experts: Sequence[Artifact], now: float) -> dict[str, float]:
    """Seconds from the end of experts' rounds to their merge: of the first, and of all together."""
    ends = [datetime.datetime.fromisoformat(expert.manifest.created).timestamp() for expert in experts]
    waits = [max(0.0, now - end) for end in ends]
    return {"longest_wait_seconds": round(max(waits), 3), "waited_seconds": round(sum(waits), 3)}


def cost(facts: dict[str, Any]) -> str:
    """What a merge has cost, in a line."""
    return (
        f"{len(facts['merged'])} experts, {facts['bytes_read']:,} bytes read and {facts['bytes_written']:,} written "
        f"in {facts['seconds']:.1f} s; they waited {facts['waited_seconds']:.0f} s together for each other, the first "
        f"{facts['longest_wait_seconds']:.0f} s"
    )
