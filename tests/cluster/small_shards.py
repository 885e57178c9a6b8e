"""Stands before the python of cleaning jobs in tests, as `cluster.container`: cuts a small corpus into many shards.

`small_shards.py HELD python3 -u …/run.py modularforge filter_0 --index 1 …`: the first start of that task cleans two
shards, makes the file HELD and waits for the end of its node.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from modularforge.data import clean_shares, cleaning, pieces, shards


def main() -> None:
    """Do as the arguments say."""
    held, arguments = Path(sys.argv[1]), sys.argv[4:]
    sys.argv = sys.argv[4:]
    pieces.UNIT_WEIGHT, pieces.PIECE_BYTES, shards.SHARD_BYTES, cleaning.SHARDS_A_FILE = 4000, 2500, 1500, 2
    vars(cleaning)["cores"] = vars(clean_shares)["cores"] = lambda: 1
    if " filter_0 --index 1 " in f" {' '.join(arguments)} " and not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        vars(cleaning)["clean_shard"] = held_after_two(vars(cleaning)["clean_shard"], held)
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


def held_after_two(clean: Any, held: Path) -> Any:
    """The function, which waits for ever when it is called for the third time."""
    cleaned: list[Path] = []

    def clean_or_wait(*arguments: Any) -> Path:
        if len(cleaned) == 2:
            held.touch()
            signal.pause()
        cleaned.append(clean(*arguments))
        return cleaned[-1]

    return clean_or_wait


if __name__ == "__main__":
    main()
