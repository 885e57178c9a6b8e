"""The few questions put to Slurm: what is in the queue (one call for all jobs), how the site is set up, one job.

Only squeue, scontrol and scancel are used; accounting (sacct) is never needed.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from modularforge.errors import UserError

TIMEOUT_SECONDS = 60
QUEUE_FORMAT = "%F|%K|%T|%N|%S|%r|%k"
LIVE_STATES = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
}  # fmt: skip
NEVER = "DependencyNeverSatisfied"


class SlurmError(UserError):
    """A Slurm command is missing, or refused what was asked."""


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue: a job, or one task of an array (`index`)."""

    job: str
    index: int | None
    state: str
    nodes: str
    start: str
    reason: str
    comment: str

    @property
    def is_live(self) -> bool:
        """Whether it runs or may still run."""
        return self.state in LIVE_STATES and self.reason != NEVER


def run_slurm(*command: str, env: dict[str, str] | None = None) -> str:
    """The output of a Slurm command; raises SlurmError with its complaint."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=env,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} must be installed, but is not on the PATH; run this on a login node of the cluster"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{command[0]} must answer within {TIMEOUT_SECONDS} s, but did not; try again later"
        ) from error
    if done.returncode:
        raise SlurmError(
            f"{' '.join(command[:2])} must succeed, but said: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def queue(names: list[str]) -> list[QueuedJob]:
    """This user's jobs with one of these names, an array task per line, ended ones that Slurm still knows included."""
    listing = run_slurm(
        "squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--name={','.join(names)}",
        f"--format={QUEUE_FORMAT}",
    )  # fmt: skip
    return [_parse(line) for line in listing.splitlines() if line.strip()]


def _parse(line: str) -> QueuedJob:
    job, index, state, nodes, start, reason, comment = line.strip().split("|", 6)
    return QueuedJob(job, int(index) if index.isdigit() else None, state, nodes, start, reason, comment)


def site_settings() -> dict[str, str]:
    """`scontrol show config` by name."""
    lines = run_slurm("scontrol", "show", "config").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def partitions() -> dict[str, dict[str, str]]:
    """`scontrol show partition` by name."""
    found = {}
    for line in run_slurm("scontrol", "--oneliner", "show", "partition").splitlines():
        values = fields(line)
        if "PartitionName" in values:
            found[values["PartitionName"]] = values
    return found


def nodes_of_site() -> list[dict[str, str]]:
    """`scontrol show node`, a node each."""
    return [fields(line) for line in run_slurm("scontrol", "--oneliner", "show", "node").splitlines() if line.strip()]


def fields(line: str) -> dict[str, str]:
    """`Name=value` pairs of one line of scontrol; of a value with blanks only the first word counts.

    The first of a name counts: later ones stand in values, such as the comment of a node or the path of a log.
    """
    found: dict[str, str] = {}
    for name, sign, value in (word.partition("=") for word in line.split()):
        if sign:
            found.setdefault(name, value)
    return found


def job_fields(job: str) -> dict[str, str]:
    """`scontrol show job` of one job, or of one array task by its name `123_4`.

    The id of an array's last task is that of the whole array: asked for by that, Slurm answers with every task.
    """
    line = run_slurm("scontrol", "--oneliner", "show", "job", job)
    return fields(line.partition(" Command=")[0])  # behind it are paths, in which folders may be called `Restarts=9`


def minutes(text: str) -> float:
    """`[days-]hours:minutes:seconds` in minutes; UNLIMITED is infinite."""
    if text in ("UNLIMITED", "INVALID", "Partition_Limit", "NONE"):
        return float("inf")
    days, _, clock = text.rpartition("-")
    hours, mins, seconds = ([0.0] * 3 + [float(part) for part in clock.split(":")])[-3:]
    return float(days or 0) * 1440 + hours * 60 + mins + seconds / 60
