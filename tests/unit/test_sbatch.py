"""The sbatch script of an array, line by line: what Slurm is asked for is seen before a cluster sees it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launcher.arrays import cut
from launcher.sbatch import Request, script_of
from modularforge.config import Config
from tests.conftest import ROOT, tiny_config

FILE = ROOT / "tests/golden/expert.sbatch"
CLUSTER = {
    "queue": "gpu",
    "account": "lab",
    "expert": {"gpus": 1, "cpus": 8, "memory_gb": 32, "time_minutes": 90},
    "array_throttle": 2,
    "setup": ["module load cuda"],
    "container": "apptainer exec --nv train.sif",
    "sbatch_options": {"reservation": "spring"},
}


def golden_script(config: Config, folder: Path) -> str:
    """The script with the places of this machine taken out."""
    part = cut([0, 1, 2], 1001, 2)[0]
    request = Request("expert", "expert-0", "0123456789abcdef", folder / "snapshot", part, ("7",), ("8",))
    script = script_of(config, request)
    for place, name in ((sys.executable, "PYTHON"), (str(folder), "RUN"), (str(Path.cwd()), "HERE")):
        script = script.replace(place, name)
    return re.sub(r"/\S*python[\d.]*", "PYTHON", script)


def test_the_script_of_an_array_is_as_it_was(tmp_path: Path) -> None:
    """Accept a change on purpose: delete tests/golden/expert.sbatch, run this test, read the new file, commit it."""
    script = golden_script(tiny_config(tmp_path / "run", cluster=CLUSTER), tmp_path)
    if not FILE.is_file():
        FILE.write_text(script, encoding="utf-8")
        pytest.fail(f"{FILE.name} is written anew: read it, commit it, and run this test again")
    assert script == FILE.read_text(encoding="utf-8")
