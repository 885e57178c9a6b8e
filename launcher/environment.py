"""The environment of a job is built, not inherited: a few variables that programs need, and what the settings name."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable

ALWAYS = ("HOME", "LANG", "LC_*", "LOGNAME", "MODULEPATH", "MODULESHOME", "PATH", "SHELL", "SLURM_CONF", "TZ", "USER")
# Variables of an outer job or of torchrun would make the inner one believe it is somebody else.
FOREIGN = ("SLURM_*", "SBATCH_*", "SRUN_*", "SQUEUE_*", "PMI*", "PMIX*", "TORCHELASTIC_*", "GROUP_*", "ROLE_*")
FOREIGN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def job_environment(pass_patterns: Iterable[str] = ()) -> dict[str, str]:
    """What a job gets from this shell: what every program needs, and what `cluster.pass_environment` names."""
    wanted = (*ALWAYS, *pass_patterns)
    return {name: value for name, value in os.environ.items() if _matches(name, wanted) and not _is_foreign(name)}


def without_torch_variables() -> dict[str, str]:
    """This job's environment without what an outer torchrun may have left in it; Slurm's own is needed by srun."""
    foreign = (*FOREIGN_NAMES, "TORCHELASTIC_*", "GROUP_*", "ROLE_*")
    return {name: value for name, value in os.environ.items() if not _matches(name, foreign)}


def _is_foreign(name: str) -> bool:
    return name != "SLURM_CONF" and (name in FOREIGN_NAMES or _matches(name, FOREIGN))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
