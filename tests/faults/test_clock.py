"""A clock that jumps by days, forwards and backwards, while a run goes on (libfaketime; takes minutes under it).

The launcher is not tried so: it sleeps between its looks, and libfaketime breaks `sleep` when the clock jumps (EINVAL).
"""

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
DAY = 86_400
JUMPS = (-DAY, DAY, 0, -30 * DAY, 400 * DAY)


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed: apt-get install faketime")
def test_a_clock_that_jumps_changes_nothing(new_run: Callable[..., Run], reference: Run, tmp_path: Path) -> None:
    run, clock, jumps = new_run(), tmp_path / "clock", 0
    clock.write_text("+0\n")
    environment = {
        **os.environ, "LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "modularforge", "run-all", "--config", run.settings]
    with open(run.log, "ab") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while process.poll() is None:
        clock.with_name("next").write_text(f"{JUMPS[jumps % len(JUMPS)]:+d}\n")
        clock.with_name("next").rename(clock)  # nobody reads half of it
        KILLS["local", run.stage_at_work(), "clock jumps"] += 1
        jumps += 1
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0, run.said()
    assert "Traceback" not in run.said()
    assert jumps > 3
    assert_undisturbed(run, reference)
