"""The command that trains on the nodes of a job: srun, and in it the stage itself or torchrun with its processes."""

from __future__ import annotations

import shlex
import sys

from launcher.allocation import Allocation
from launcher.environment import without_torch_variables
from launcher.frozen import ENTRY_NAME, ROOT
from launcher.rendezvous import meeting_point
from launcher.tasks import Task, nodes_of
from modularforge.config import Config

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
# How long the other nodes may take to notice that one has ended.
LAST_TASK_SECONDS = 60


def processes_of(config: Config, task: Task, allocation: Allocation) -> int:
    """Training processes on each node; one for a task that is no training."""
    wanted = allocation.processes or nodes_of(config, task.group).processes_per_node
    return wanted if task.is_training else 1


def training_command(config: Config, task: Task, allocation: Allocation, options: list[str]) -> list[str]:
    """The whole command, from srun to the stage's own options."""
    processes = processes_of(config, task, allocation)
    stage = [*_module("modularforge"), *task.arguments, *options]
    if not task.is_training or allocation.nodes * processes == 1:
        return [*_srun(allocation), *_python(config), *stage]
    return [*_srun(allocation), *_torchrun(config, allocation, processes), *stage]


def child_environment(config: Config, processes: int, allocation: Allocation) -> dict[str, str]:
    """The environment of the training: this job's, without traces of an outer one, and a share of the cores."""
    return {
        "OMP_NUM_THREADS": str(max(1, allocation.cpus // processes)),
        **without_torch_variables(),
        "PYTHONUNBUFFERED": "1",
        # torchrun kills its processes after this time; a checkpoint must fit in.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.cluster.warning_seconds),
    }


def _srun(allocation: Allocation) -> list[str]:
    """One task per node with all of its cores: before 23.11 srun does not take --cpus-per-task from the job."""
    return [
        "srun", f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={allocation.cpus}", "--export=ALL", "--kill-on-bad-exit=0", f"--wait={LAST_TASK_SECONDS}",
    ]  # fmt: skip


def _torchrun(config: Config, allocation: Allocation, processes: int) -> list[str]:
    """torchrun on every node; the shell puts in which node it is."""
    address, port = meeting_point(allocation.nodes, int(allocation.job), allocation.restarts)
    words = [
        *_python(config), *_module("modularforge.training.elastic"), f"--nnodes={allocation.nodes}",
        f"--nproc-per-node={processes}", f"--master-addr={address}", f"--master-port={port}",
        f"--rdzv-id={allocation.job}.{allocation.restarts}", f"--signals-to-handle={SIGNALS}",
    ]  # fmt: skip
    shell = f'exec {shlex.join(words)} --node-rank="$SLURM_NODEID" "$@"'
    return ["bash", "-c", shell, "bash"]


def _python(config: Config) -> list[str]:
    container = shlex.split(config.cluster.container or "")
    return [*container, "python3" if container else sys.executable, "-u"]


def _module(name: str) -> list[str]:
    """How to run a module: of the frozen code this program is part of, or of the working tree."""
    return [str(ROOT / ENTRY_NAME), name] if _is_frozen() else ["-m", name]


def _is_frozen() -> bool:
    return (ROOT / ENTRY_NAME).is_file()
