"""SIGKILL, SIGTERM and SIGINT at random moments of all stages: what comes out is what an undisturbed run makes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.faults.runs import (
    COMMANDS,
    KILLS,
    STAGES,
    Run,
    assert_same_stage,
    assert_undisturbed,
    copy_before,
    kill_until_finished,
    leftovers,
    wait_for,
)

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("seed", range(8))
def test_a_run_that_is_killed_again_and_again(seed: int, new_run: MakeRun, reference: Run) -> None:
    run, luck = new_run(), random.Random(seed)
    kill_until_finished(run, lambda: run.start("run-all"), luck, "local", signal.SIGKILL)
    assert_undisturbed(run, reference)
    assert leftovers(run.place) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_again_and_again(number: int, new_run: MakeRun, reference: Run) -> None:
    run, luck = new_run(), random.Random(number)
    kill_until_finished(run, lambda: run.start("run-all"), luck, "local", number)
    assert_undisturbed(run, reference)
    assert "Traceback" not in run.said()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_asked_to_stop_ends_with_a_sentence(
    stage: str, number: int, new_run: MakeRun, reference: Run
) -> None:
    """Signals come at eight moments of the stage's own life; every end is quiet, and the stage goes on afterwards."""
    run, luck = new_run(), random.Random(number)
    copy_before(stage, reference, run)
    kill_until_finished(run, lambda: run.start(*COMMANDS[stage]), luck, "stage", number)
    assert_same_stage(stage, run, reference)
    assert "Traceback" not in run.said()


@pytest.mark.parametrize("stage", STAGES)
def test_two_at_once_make_one_artifact(stage: str, new_run: MakeRun, reference: Run) -> None:
    """The second waits, does nothing or is told of the first; both together make what one alone makes."""
    run = new_run()
    copy_before(stage, reference, run)
    processes = [run.start(*COMMANDS[stage]) for _ in range(2)]
    for process in processes:
        process.join(240)
    codes = sorted(process.exitcode for process in processes)
    assert codes in ([0, 0], [0, 2]), run.said()
    assert "Traceback" not in run.said()
    assert run.finish(*COMMANDS[stage]) == 0, run.said()
    KILLS["two", stage, "two at once"] += 1
    assert_same_stage(stage, run, reference)


@pytest.mark.parametrize("stage", ["backbone", "expert", "assemble", "evaluate"])
def test_a_stage_that_is_stopped_for_a_minute_goes_on(stage: str, new_run: MakeRun, reference: Run) -> None:
    run = new_run()
    copy_before(stage, reference, run)
    process = run.start(*COMMANDS[stage])
    wait_for(lambda: run.said() or process.exitcode is not None, "it has begun")
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(60)
    os.killpg(process.pid, signal.SIGCONT)
    process.join(240)
    assert process.exitcode == 0, run.said()
    KILLS["local", stage, "STOP for a minute"] += 1
    assert_same_stage(stage, run, reference)
