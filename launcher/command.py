"""The command that trains on the nodes of a job and its environment: the stage itself, or torchrun with its processes.

On Slurm both run under srun, as a step of their own. Environments are built, not inherited: a few variables that
programs need, and what the settings name.
"""

from __future__ import annotations

import fnmatch
import os
import shlex
import sys
from collections.abc import Iterable

from launcher.allocation import Allocation, meeting_point
from launcher.snapshot import ENTRY_NAME, ROOT
from launcher.tasks import Task, nodes_of
from modularforge.config import Config
from modularforge.pipeline import STAGES

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"
# How long the other nodes may take to notice that one has ended.
LAST_TASK_SECONDS = 60
ALWAYS = ("HOME", "LANG", "LC_*", "LOGNAME", "MODULEPATH", "MODULESHOME", "PATH", "SHELL", "SLURM_CONF", "TZ", "USER")
# Variables of an outer job or of torchrun would make the inner one believe it is somebody else.
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*",
            "GROUP_*", "ROLE_*")  # fmt: skip
FOREIGN = (*TORCHRUN, "SLURM_*", "SBATCH_*", "SRUN_*", "SQUEUE_*", "PMI*", "PMIX*")


def processes_of(config: Config, task: Task, allocation: Allocation) -> int:
    """Training processes on each node; one for a task that is no training."""
    wanted = allocation.processes or nodes_of(config, task.group).processes_per_node
    return wanted if _is_shared(config, task) else 1


def _is_shared(config: Config, task: Task) -> bool:
    """Whether processes share it: a calibration, which is made with the assembled model, where that is in pieces."""
    return task.is_training or (config.training.parallel != "ddp" and any(STAGES[name].phase for name in task.stages))


def training_command(config: Config, task: Task, allocation: Allocation, options: list[str]) -> list[str]:
    """The whole command, from srun to the stage's own options."""
    processes = processes_of(config, task, allocation)
    stage = [*_module("modularforge"), *task.arguments, *options]
    is_alone = not _is_shared(config, task) or allocation.nodes * processes == 1
    if allocation.is_local:
        return [sys.executable, "-u", *([] if is_alone else _local_torchrun(processes)), *stage]
    return [*_srun(allocation), *(_python(config) if is_alone else _torchrun(config, allocation, processes)), *stage]


def child_environment(config: Config, processes: int, allocation: Allocation) -> dict[str, str]:
    """The environment of the training: this job's, without traces of an outer one, and a share of the cores."""
    return {
        "OMP_NUM_THREADS": str(max(1, allocation.cpus // processes)),
        **without_torch_variables(),
        "PYTHONUNBUFFERED": "1",
        # torchrun kills its processes after this time; a checkpoint must fit in.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(config.cluster.warning_seconds),
    }


def job_environment(pass_patterns: Iterable[str] = ()) -> dict[str, str]:
    """What a job gets from this shell: what every program needs, and what `cluster.pass_environment` names."""
    wanted = (*ALWAYS, *pass_patterns)
    return {name: value for name, value in os.environ.items() if _matches(name, wanted) and not _is_foreign(name)}


def without_torch_variables() -> dict[str, str]:
    """This job's environment without what an outer torchrun may have left in it; Slurm's own is needed by srun."""
    return {name: value for name, value in os.environ.items() if not _matches(name, TORCHRUN)}


def _is_foreign(name: str) -> bool:
    return name != "SLURM_CONF" and _matches(name, FOREIGN)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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


def _local_torchrun(processes: int) -> list[str]:
    """torchrun that finds a free port by itself."""
    return [*_module("modularforge.training.elastic"), "--standalone", f"--nproc-per-node={processes}"]


def _python(config: Config) -> list[str]:
    container = shlex.split(config.cluster.container or "")
    return [*container, "python3" if container else sys.executable, "-u"]


def _module(name: str) -> list[str]:
    """How to run a module: of the snapshot of the code this program is part of, or of the working tree."""
    return [str(ROOT / ENTRY_NAME), name] if (ROOT / ENTRY_NAME).is_file() else ["-m", name]
