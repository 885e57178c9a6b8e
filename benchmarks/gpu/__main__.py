"""The proof on a GPU, in slices of under nine minutes that continue from small result files.

    make gpu-proof [SLICE=a] [TINY=1]
    python -m benchmarks.gpu [--slice a] [--output runs/gpu-proof] [--tiny] [--minutes 8.5] [--pack]

a: the tests marked `gpu`; b: speed beside plain torch and what else is installed; c: a study at 40 M parameters;
d: SmolLM2-135M with LoRA and FFN experts. Ends with 0 when all is done, with 3 when there is more: call again. `--tiny`
does all of it on a CPU in minutes; `--pack` tokenises the texts of c and d beforehand, on a machine that has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.marked import test_parts
from benchmarks.gpu.parts import MINUTES, Part, Proof
from benchmarks.gpu.speed import speed_parts
from benchmarks.gpu.studies import pack, study_parts
from benchmarks.gpu.summary import summary

SLICES = ("a", "b", "c", "d")
MORE = 3
"""Exit status of a call that left something to do, or to mend."""


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    proof = Proof(options.output or Path("runs/gpu-proof-tiny" if options.tiny else "runs/gpu-proof"))
    chosen = [options.slice] if options.slice else list(SLICES)
    if options.pack:
        pack(proof.folder, chosen, options.tiny)
        return 0
    parts = [part for name in chosen for part in parts_of(name, proof.folder, options.tiny)]
    left = proof.go_on(parts, options.minutes)
    print(summary([(part, proof.result(part)) for part in parts]))
    if left:
        print(f"{len(left)} of {len(parts)} parts are left, {left[0].name} first: the same command goes on")
    return MORE if left else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", choices=SLICES, help="only this one")
    parser.add_argument("--output", type=Path, help="folder of results (and of what c and d train)")
    parser.add_argument("--tiny", action="store_true", help="everything at a size for a CPU, to see that it runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no other part is begun")
    parser.add_argument("--pack", action="store_true", help="only tokenise the texts of c and d")
    return parser.parse_args(arguments)


def parts_of(name: str, folder: Path, tiny: bool) -> list[Part]:
    """The parts of a slice, in order."""
    if name == "a":
        return test_parts(tiny)
    return speed_parts(tiny) if name == "b" else study_parts(name, folder, tiny)


if __name__ == "__main__":
    sys.exit(main())
