"""How long the programs take to answer: `modularforge --help` and `import launcher` (targets: under 0.6 s each).

    python benchmarks/startup.py [--rounds 7]

Each is a fresh process; the smallest of the rounds is printed, with an empty interpreter's start as the reference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

CASES = {
    "python -c pass (reference)": ["-c", "pass"],
    "python -m modularforge --help": ["-m", "modularforge", "--help"],
    "python -c 'import launcher'": ["-c", "import launcher"],
    "python -m launcher --help": ["-m", "launcher", "--help"],
    "python -m checkpoints --help": ["-m", "checkpoints", "--help"],
    "import torch (what they avoid)": ["-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    reference = 0.0
    for name, arguments in CASES.items():
        seconds = min(measure(arguments) for _ in range(rounds))
        reference = reference or seconds
        print(f"{name:34} {seconds:6.3f} s   {seconds / reference:5.1f} x an empty interpreter")


def measure(arguments: list[str]) -> float:
    """Seconds of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
