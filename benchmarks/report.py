"""Time and memory of the report of a large run: 64 experts and 100,000 metric lines.

    python benchmarks/report.py [--experts 64] [--lines 100000] [--keep FOLDER]

The claim is under 10 seconds and 500 MB, in a process of its own, the start of Python and the imports included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.synthetic_runs import write_run

MOST_SECONDS, MOST_MEGABYTES = 10.0, 500.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--keep", help="write the run there and leave it, to look at the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or f"{scratch}/run"
        lines = write_large_run(folder, arguments.experts, arguments.lines)
        seconds, processor_seconds, megabytes = measure(folder)
    cost = f"{seconds:.1f} s ({processor_seconds:.1f} s of CPU), {megabytes:.0f} MB"
    print(f"{arguments.experts} experts, {lines:,} lines: {cost}")
    is_met = seconds < MOST_SECONDS and megabytes < MOST_MEGABYTES
    print(f"claim (under {MOST_SECONDS:.0f} s and {MOST_MEGABYTES:.0f} MB): {'holds' if is_met else 'does not hold'}")
    return int(not is_met)


def write_large_run(folder: str, experts: int, lines: int) -> int:
    """A run with that many metric lines, four of training to one of validation; returns how many there are."""
    every = 5
    write_run(folder, experts, every * (lines * 4 // 5 // (experts + 2)), every)
    return sum(path.read_bytes().count(b"\n") for path in Path(folder, "metrics").glob("*.jsonl"))


# Asked for its own peak: what the kernel says of it (ru_maxrss) begins with the memory of the program that starts it.
REPORT = """
import atexit, pathlib, runpy, sys
folder, peak = sys.argv[1:]
atexit.register(lambda: pathlib.Path(peak).write_text(pathlib.Path("/proc/self/status").read_text()))
sys.argv = ["modularforge", "report", folder]
runpy.run_module("modularforge", run_name="__main__")
"""


def measure(folder: str) -> tuple[float, float, float]:
    """Wall-clock and CPU seconds and peak resident megabytes of `modularforge report`; Linux only."""
    with tempfile.NamedTemporaryFile("r") as peak:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", REPORT, folder, peak.name])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit("the report failed")
        (kilobytes,) = (line.split()[1] for line in peak if line.startswith("VmHWM:"))
    return seconds, usage.ru_utime + usage.ru_stime, int(kilobytes) / 1024


if __name__ == "__main__":
    sys.exit(main())
