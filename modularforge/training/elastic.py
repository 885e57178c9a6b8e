"""torchrun with this project's exit codes: 130 when the job was stopped, else that of the process that failed first.

torchrun itself ends with 1 in all these cases, and whoever started it could not tell a stop from a crash. Takes
torchrun's own arguments: ``python -m modularforge.training.elastic --nproc-per-node 2 script.py …``.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from modularforge.exits import INTERRUPTED


def main(arguments: list[str]) -> int:
    """Run torchrun in this process; returns the exit code."""
    try:
        torchrun(arguments)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        first = error.get_first_failure()[1].exitcode
        # Ranks that saved and left may make another one fail in its last collective: a stop all the same.
        return INTERRUPTED if INTERRUPTED in codes else first if first > 0 else 128 - first
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
