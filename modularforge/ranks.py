"""What torchrun says in the environment about this process; the only file that reads its variables. Loads no torch.

Variables that an earlier job or a shell left over are not believed: a process that torchrun did not start would wait
for others that never come.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from modularforge.errors import ConfigError

STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
ERROR_FILE, SCRATCH = "TORCHELASTIC_ERROR_FILE", "torchelastic_"
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks(NamedTuple):
    """Number of this process among all, its number on this machine, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def own_rank() -> Ranks:
    """This process among those that train together; raises ConfigError for variables that torchrun did not set."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    found = [name for name in VARIABLES if name in os.environ]
    values = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if STARTED_BY_TORCHRUN in os.environ and all(value.isdecimal() for value in values):
        return Ranks(*map(int, values))
    raise ConfigError(
        f"WORLD_SIZE must be set by torchrun alone, but is {os.environ['WORLD_SIZE']!r:.20} in a process that torchrun "
        f"did not start; unset {' '.join(found)}, or start it with torchrun"
    )


def node_size() -> int:
    """Processes of the same training on this machine, as torchrun says."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(value) if STARTED_BY_TORCHRUN in os.environ and value.isdecimal() else 1


def remove_empty_scratch() -> None:
    """Remove the empty folders that torchrun makes in the temporary folder for each process, and leaves there."""
    folders = Path(os.environ.get(ERROR_FILE, "")).parents
    if not any(folder.name.startswith(SCRATCH) for folder in folders):
        return  # of a torchrun with a --log-dir of its own
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # another process of the training is still in there
            return
        if folder.name.startswith(SCRATCH):
            return


def is_quiet() -> bool:
    """Whether another process of the same training speaks for this one."""
    is_one_of_many = os.environ.get("WORLD_SIZE", "1") != "1" and STARTED_BY_TORCHRUN in os.environ
    return is_one_of_many and os.environ.get("RANK", "0") != "0"
