"""A clock that jumps by days, forwards and backwards, while a run goes on (libfaketime).

The launcher sleeps between its looks, which libfaketime breaks when the clock jumps (EINVAL). So its own clock is
changed in Python, and that of its jobs by the library.
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
from tests.faults.test_launcher_kills import on_one_core

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
DAY = 86_400
JUMPS = (-DAY, DAY, 0, -30 * DAY, 400 * DAY)
LAUNCHER = """
import os, runpy, time
real = time.time
time.time = lambda: real() + float(open(os.environ["FAKETIME_TIMESTAMP_FILE"]).read())
os.environ["LD_PRELOAD"] = os.environ.pop("JOBS_PRELOAD")
runpy.run_module("launcher", run_name="__main__")
"""


def start(program: str, run: Run, clock: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    if program == "launcher":
        words, environment["JOBS_PRELOAD"] = ["-c", LAUNCHER], str(LIBRARIES[0])
    else:
        words, environment["LD_PRELOAD"] = ["-m", "modularforge", "run-all"], str(LIBRARIES[0])
    with open(run.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, *words, "--config", run.settings], cwd=ROOT, env=environment, stdout=log, stderr=log,
            preexec_fn=on_one_core,
        )  # fmt: skip


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed: apt-get install faketime")
@pytest.mark.parametrize("program", ["modularforge", "launcher"])
def test_a_clock_that_jumps_changes_nothing(
    program: str, new_run: Callable[..., Run], reference: Run, tmp_path: Path
) -> None:
    run, clock, jumps = new_run(), tmp_path / "clock", 0
    clock.write_text("+0\n")
    process = start(program, run, clock)
    while process.poll() is None:
        clock.with_name("next").write_text(f"{JUMPS[jumps % len(JUMPS)]:+d}\n")
        clock.with_name("next").rename(clock)  # nobody reads half of it
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
