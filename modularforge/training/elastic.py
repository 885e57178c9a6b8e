"""torchrun with this project's exit codes: 130 when the job was stopped, else that of the process that failed first.

torchrun itself ends with 1 in all these cases, and whoever started it could not tell a stop from a crash. Takes
torchrun's own arguments: ``python -m modularforge.training.elastic --nproc-per-node 2 script.py …``. What it leaves in
the temporary folder when it is killed is removed at the next start.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from modularforge.exits import INTERRUPTED

SCRATCH = "modularforge-torchrun-"


def main(arguments: list[str]) -> int:
    """Run torchrun in this process; returns the exit code."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        try:
            torchrun([f"--log-dir={folder}", *arguments])
        except SignalException:
            return INTERRUPTED
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            first = error.get_first_failure()[1].exitcode
            # Ranks that saved and left may make another one fail in its last collective: a stop all the same.
            return INTERRUPTED if INTERRUPTED in codes else first if first > 0 else 128 - first
    return 0


def _sweep() -> None:
    """Remove what this user's torchruns left that are there no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdecimal() and not _is_alive(int(owner)) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
