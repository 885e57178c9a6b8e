"""On a real Slurm: jobs killed at random, nodes that crash, a controller that stops, jobs cancelled, launched again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.cluster.conftest import NODES, Launched, cluster, session_cluster
from tests.cluster.packages import missing_programs
from tests.cluster.slurm import wait_for
from tests.faults.runs import KILLS, Run, assert_undisturbed, values

__all__ = ["cluster", "session_cluster"]  # fixtures
pytestmark = pytest.mark.skipif(
    bool(missing_programs()) or os.getuid() != 0, reason="Slurm is not installed: `make test-cluster` installs it"
)
KILLED_IN_SLURM = 60


@pytest.fixture
def launched(cluster: object, new_run: Callable[..., Run]) -> tuple[Launched, Run]:
    """One run, as the launcher's tests and as this campaign see it."""
    run = new_run(cluster={**NODES, "backbone": {"nodes": 1, "cpus": 1}, "max_crashes": 50})
    return Launched(cluster, run.values), run  # type: ignore[arg-type]


def is_over(run: Run) -> bool:
    return run.stage_at_work() == "end"


def launch_until_finished(launched: Launched, run: Run, disturb: Callable[[], None], seconds: float = 1500) -> None:
    """Launch, and launch again whenever nothing is left in the queue, until all is committed."""
    end = time.monotonic() + seconds
    while not is_over(run):
        assert time.monotonic() < end, launched.launcher("status")
        if not launched.cluster.jobs():
            launched.submit()
        disturb()
    wait_for(lambda: not launched.cluster.jobs(), "the queue is empty", 120)


def test_jobs_that_are_killed_again_and_again(launched: tuple[Launched, Run], reference: Run) -> None:
    slurm_run, run = launched
    luck, kills = random.Random(0), 0

    def kill_one() -> None:
        nonlocal kills
        time.sleep(luck.uniform(0.2, 3))
        processes = sorted(slurm_run.cluster.job_processes())
        if processes and kills < KILLED_IN_SLURM:
            with contextlib.suppress(ProcessLookupError):
                stage = run.stage_at_work()
                os.kill(luck.choice(processes), signal.SIGKILL)
                kills += 1
                KILLS["slurm", stage, "SIGKILL"] += 1

    launch_until_finished(slurm_run, run, kill_one)
    assert_undisturbed(run, reference)


def test_nodes_that_crash_and_come_back(launched: tuple[Launched, Run], reference: Run) -> None:
    slurm_run, run = launched
    luck, crashes = random.Random(1), 0

    def crash_one() -> None:
        nonlocal crashes
        time.sleep(luck.uniform(2, 6))
        if crashes >= 6:
            return
        node = f"node{luck.randrange(1, 5)}"
        KILLS["slurm", run.stage_at_work(), "node crash"] += 1
        slurm_run.cluster.crash(node)
        crashes += 1
        time.sleep(luck.uniform(0, 8))
        slurm_run.cluster.start_node(node)

    launch_until_finished(slurm_run, run, crash_one)
    assert_undisturbed(run, reference)


def test_a_controller_that_stops_for_a_minute(launched: tuple[Launched, Run], reference: Run) -> None:
    """`wait` and `status --watch` outlast it, and no job is lost or doubled."""
    slurm_run, run = launched
    slurm_run.submit()
    waiting = slurm_run.start("wait")
    wait_for(lambda: run.has("data"), "the data is there", 90)
    stage = run.stage_at_work()
    controllers = slurm_run.cluster.pids_of("slurmctld")
    assert controllers
    for pid in controllers:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(60)
    for pid in controllers:
        os.kill(pid, signal.SIGCONT)
    KILLS["slurm", stage, "controller stopped"] += 1
    output, errors = waiting.communicate(timeout=600)
    assert waiting.returncode == 0, output + errors
    assert_undisturbed(run, reference)
    jobs = [item["job"] for item in slurm_run.submissions()]
    assert len(jobs) == len(set(jobs))


def test_one_expert_that_is_cancelled_and_launched_again(launched: tuple[Launched, Run], reference: Run) -> None:
    slurm_run, run = launched
    slurm_run.submit()
    wait_for(lambda: slurm_run.events("expert-1", "started"), "expert-1 has started", 120)
    slurm_run.cluster.run("scancel", f"{slurm_run.job('expert')}_1")
    KILLS["slurm", "expert", "scancel"] += 1
    launch_until_finished(slurm_run, run, lambda: time.sleep(1))
    assert_undisturbed(run, reference)


@pytest.mark.parametrize("stage", ["data", "backbone", "experts/expert-0"])
def test_a_run_that_is_cancelled_in_the_middle_and_launched_again(
    stage: str, launched: tuple[Launched, Run], reference: Run
) -> None:
    slurm_run, run = launched
    slurm_run.submit()
    wait_for(lambda: run.has(stage), f"{stage} is there", 120)
    slurm_run.launcher("cancel")
    KILLS["slurm", run.stage_at_work(), "cancel"] += 1
    wait_for(lambda: not slurm_run.cluster.jobs(), "the queue is empty", 120)
    launch_until_finished(slurm_run, run, lambda: time.sleep(1))
    assert_undisturbed(run, reference)


def test_the_settings_of_the_campaign_are_those_of_the_reference(launched: tuple[Launched, Run]) -> None:
    """Nothing of `cluster` changes what is computed; else the comparisons above would compare two runs."""
    _, run = launched
    plain = values(run.url)
    assert {name: value for name, value in run.values.items() if name != "cluster"} == plain
