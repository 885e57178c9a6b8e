"""What Slurm gave this job, from its environment; the only file of the launcher that reads SLURM_ variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from modularforge.errors import ConfigError


@dataclass(frozen=True)
class Allocation:
    """One job, or one task of an array, as it runs now; `job` is its own id, `name` the one to requeue it by."""

    job: str
    array_job: str
    array_index: int | None
    restarts: int
    nodes: int
    node_list: str
    cpus: int
    gpus: int
    processes: int | None

    @property
    def name(self) -> str:
        """`123`, or `123_4` for a task of an array."""
        return self.job if self.array_index is None else f"{self.array_job}_{self.array_index}"

    @staticmethod
    def of_this_job(processes: int | None) -> Allocation:
        """The allocation this program runs in; raises ConfigError outside of a job."""
        values = os.environ
        if "SLURM_JOB_ID" not in values:
            raise ConfigError(
                "python -m launcher.node must run in a Slurm job, but SLURM_JOB_ID is not set; submit it with sbatch, "
                "or run the stage itself with `python -m modularforge`"
            )
        return Allocation(
            job=str(_number("SLURM_JOB_ID")),
            array_job=values.get("SLURM_ARRAY_JOB_ID", values["SLURM_JOB_ID"]),
            array_index=_number("SLURM_ARRAY_TASK_ID") if "SLURM_ARRAY_TASK_ID" in values else None,
            restarts=_number("SLURM_RESTART_COUNT"),
            nodes=_number("SLURM_JOB_NUM_NODES", default=1),
            node_list=values.get("SLURM_JOB_NODELIST", ""),
            cpus=_number("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", default=1),
            gpus=_number("SLURM_GPUS_ON_NODE"),
            processes=processes,
        )


def _number(*names: str, default: int = 0) -> int:
    """The first of these variables that is set, as a number."""
    for name in names:
        if text := os.environ.get(name):
            if text.isdecimal():
                return int(text)
            raise ConfigError(f"{name} must be a number from Slurm, but is {text!r:.40}; unset it, or use sbatch")
    return default
