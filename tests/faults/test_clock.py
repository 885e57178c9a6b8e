"""A clock that jumps by a day, forwards and backwards, while a run goes on (libfaketime; install `faketime`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.runs import KILLS, Run, assert_undisturbed

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
JUMPS = ("-1d", "+1d", "+0", "-30d", "+400d")


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed: apt-get install faketime")
@pytest.mark.parametrize("program", ["modularforge", "launcher"])
def test_a_clock_that_jumps_changes_nothing(
    program: str, new_run: Callable[..., Run], reference: Run, tmp_path: Path
) -> None:
    run, clock = new_run(), tmp_path / "clock"
    clock.write_text("+0\n")
    environment = {
        **os.environ, "LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", program, *(["run-all"] if program == "modularforge" else []), "--config"]
    with open(run.log, "ab") as log:
        process = subprocess.Popen([*words, run.settings], cwd=ROOT, env=environment, stdout=log, stderr=log)
    jumps = 0
    while process.poll() is None:
        clock.write_text(JUMPS[jumps % len(JUMPS)] + "\n")
        KILLS[program, run.stage_at_work(), "clock jumps"] += 1
        jumps += 1
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0, run.said()
    assert "Traceback" not in run.said()
    assert jumps > 3
    assert_undisturbed(run, reference)
