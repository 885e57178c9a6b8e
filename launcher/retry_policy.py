"""What to do when a job's program has ended: nothing, start again, or give up. Pure decisions on a job's events.

This is the one layer that retries. Preempted jobs always start again, time limits and crashes a bounded number of
times, and two crashes in a row without progress end a job at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.events import Event
from modularforge.config import ClusterConfig
from modularforge.exits import INTERRUPTED, USER_ERROR

# Killed by SIGHUP, SIGINT, SIGUSR2 or SIGTERM before the loop could catch it.
STOPPED_CODES = (INTERRUPTED, 129, 140, 143)
# Slurm sends the warning up to a minute early.
WARNING_SLACK_MINUTES = 1.5
# The state of a job here whose launcher passed a stop on, where Slurm would say CANCELLED or COMPLETING.
ASKED_TO_STOP = "ASKED_TO_STOP"


@dataclass(frozen=True)
class Ended:
    """How one start of a job ended: exit code, Slurm's view of the job, and its checkpoint's step before and after.

    `is_sent_back`: Slurm has requeued it already, at a preemption without grace or because somebody asked for it.
    """

    code: int
    state: str = "RUNNING"
    was_preempted: bool = False
    run_minutes: float = 0.0
    limit_minutes: float = float("inf")
    first_step: int = 0
    step: int = 0
    is_sent_back: bool = False


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why; `text` is for people."""

    again: bool
    reason: str
    text: str


def decide(ended: Ended, history: list[Event], cluster: ClusterConfig) -> Decision:
    """What to do about a program that ended without its artifact; `history` holds the events of this submission."""
    if ended.state == ASKED_TO_STOP:
        return Decision(False, "cancelled", "it was asked to stop")
    if ended.state != "RUNNING":
        return Decision(False, "cancelled", f"Slurm is ending this job (its state is {ended.state})")
    if ended.code in STOPPED_CODES:
        return _after_a_stop(ended, history, cluster)
    return _after_a_crash(ended, history, cluster)


def _after_a_stop(ended: Ended, history: list[Event], cluster: ClusterConfig) -> Decision:
    at_limit = ended.run_minutes + cluster.warning_seconds / 60 + WARNING_SLACK_MINUTES >= ended.limit_minutes
    if ended.was_preempted or not at_limit:
        reason = "preempted" if ended.was_preempted else "stopped by a signal"
        return Decision(True, reason, f"{reason}; goes on from its checkpoint")
    used = count_requeues(history, "time limit")
    if used >= cluster.max_time_limits:
        return Decision(False, "time limit", f"it reached its time limit {used + 1} times (cluster.max_time_limits)")
    return Decision(True, "time limit", "its time limit is near; goes on from its checkpoint")


def _after_a_crash(ended: Ended, history: list[Event], cluster: ClusterConfig) -> Decision:
    crashes = [event for event in history if event["event"] == "requeued" and event.get("reason") == "crashed"]
    if ended.code == USER_ERROR and ended.step == ended.first_step:
        return Decision(False, "failed", "it ended with an error that starting again does not fix")
    if crashes and ended.step <= int(crashes[-1].get("step", 0)):
        return Decision(False, "failed", f"it crashed twice without progress, last with code {ended.code}")
    if len(crashes) >= cluster.max_crashes:
        return Decision(False, "failed", f"it crashed {len(crashes) + 1} times (cluster.max_crashes)")
    return Decision(True, "crashed", f"it crashed with code {ended.code}; starts again")


def count_requeues(history: list[Event], reason: str | None = None) -> int:
    """How often a job was sent back to the queue, for this reason or for any."""
    return sum(event["event"] == "requeued" and reason in (None, event.get("reason")) for event in history)
