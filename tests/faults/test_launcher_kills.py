"""SIGKILL of the local launcher, of one of its jobs, or of all at once, at random moments, and launched again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.runs import KILLS, Run, assert_undisturbed, leftovers

KILLS_OF_ONE_RUN = 25
START_SECONDS = 2.5  # what a job spends on imports: a kill within it finds no job at work


def start(run: Run) -> subprocess.Popen[bytes]:
    """`python -m launcher` as a user starts it, on one core: on two, its jobs add in another order (two threads)."""
    with open(run.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", "--config", run.settings], cwd=ROOT, stdout=log, stderr=log,
            env={**os.environ, **run.environment}, start_new_session=True, preexec_fn=on_one_core,
        )  # fmt: skip


def on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def descendants(pid: int) -> list[int]:
    """Processes below one, children first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [inner for child in map(int, children) for inner in (child, *descendants(child))]


@pytest.mark.parametrize("seed", range(6))
def test_a_launcher_and_its_jobs_are_killed_again_and_again(
    seed: int, new_run: Callable[..., Run], reference: Run
) -> None:
    run, luck, kills = new_run(launcher={"max_workers": 2}), random.Random(seed), 0
    while True:
        process = start(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS + luck.expovariate(0.3) if kills < KILLS_OF_ONE_RUN else 600)
        if process.returncode == 0:
            break
        assert process.returncode is None, f"ended with {process.returncode}:\n{run.said()[-3000:]}"
        below = descendants(process.pid)
        whole = luck.choice(("launcher", "job", "all"))
        victims = {"launcher": [process.pid], "job": below[:1], "all": [process.pid, *below]}[whole]
        stage = run.stage_at_work()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                KILLS["launcher", stage, f"SIGKILL of {whole}"] += 1
                kills += 1
        if whole == "job":  # the launcher notices, tells, and ends or goes on without
            process.wait(120)
        process.wait(60)
    assert "Traceback" not in run.said()
    assert_undisturbed(run, reference)
    assert leftovers(run.place) == []
