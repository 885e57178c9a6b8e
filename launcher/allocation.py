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
        index = values.get("SLURM_ARRAY_TASK_ID")
        return Allocation(
            job=values["SLURM_JOB_ID"],
            array_job=values.get("SLURM_ARRAY_JOB_ID", values["SLURM_JOB_ID"]),
            array_index=None if index is None else int(index),
            restarts=int(values.get("SLURM_RESTART_COUNT", "0")),
            nodes=int(values.get("SLURM_JOB_NUM_NODES", "1")),
            node_list=values.get("SLURM_JOB_NODELIST", ""),
            cpus=int(values.get("SLURM_CPUS_PER_TASK") or values.get("SLURM_CPUS_ON_NODE") or 1),
            gpus=int(values.get("SLURM_GPUS_ON_NODE", "0")),
            processes=processes,
        )
