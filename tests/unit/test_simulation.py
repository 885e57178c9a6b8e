"""The simulation of many GPUs: against arithmetic, Daly's formula, and runs that were published."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from launcher.published import byterobust, llama_3
from launcher.simulated_plan import Assumptions, assumptions_of, cluster_of, describe_simulation, one_job, phases_of
from launcher.simulation import (
    HOUR,
    Cluster,
    Fault,
    Job,
    best_interval,
    expected_seconds,
    simulate,
    young_interval,
)
from modularforge.errors import ConfigError
from tests.conftest import tiny_config

STOP = Fault("stop", 1 / (4 * 16), (600, 600))  # on 16 GPUs every four hours


def test_without_faults_everything_is_arithmetic() -> None:
    cluster = Cluster(16, start=30, store=1e9, link=1e8)
    job = Job("job", 16, 1000, pause=10, every=300, state_bytes=4e9, read_bytes=8e9)
    outcome = simulate(cluster, [[job]])
    # Three full intervals and a rest; each checkpoint takes 4 s beside its pause; reading takes 8 s.
    assert outcome.seconds == pytest.approx(30 + 8 + 1000 + 4 * (10 + 4))
    assert outcome.lost_gpu_hours == pytest.approx(16 * (30 + 8 + 56) / HOUR)
    assert outcome.goodput == pytest.approx(1000 / 1094)


def test_a_checkpoint_in_the_background_costs_its_pause_and_the_last_one_its_writing() -> None:
    cluster = Cluster(8, store=1e9)
    job = Job("job", 8, 1000, pause=1, every=250, state_bytes=100e9, in_background=True)
    assert simulate(cluster, [[job]]).seconds == pytest.approx(1000 + 4 + 100)
    slow = replace(job, state_bytes=400e9)  # a save waits for the one before it
    assert simulate(cluster, [[slow]]).seconds == pytest.approx(250 + 4 * 400 + 1 + 1 + 1 + 1)


def test_jobs_that_do_not_fit_wait_and_phases_follow_each_other() -> None:
    cluster = Cluster(16)
    jobs = [Job(f"job-{number}", 8, 100, every=100) for number in range(5)]
    outcome = simulate(cluster, [jobs, [Job("last", 16, 10, every=10)]])
    assert [ran.ended for ran in outcome.phases[0]] == [100, 100, 200, 200, 300]
    assert outcome.phases[0][4].waiting == 200
    assert outcome.seconds == 310
    assert simulate(cluster, [jobs]).seconds_of(0.8) == 200


def test_requests_are_served_one_after_another() -> None:
    jobs = [Job(f"job-{number}", 1, 100, every=100, requests=50) for number in range(4)]
    outcome = simulate(Cluster(4, store_requests=10), [jobs])
    starts_and_ends = 20 + 100  # the last has read after 20 s; each then writes for 5 s when it is through
    assert outcome.seconds == pytest.approx(starts_and_ends + 5)


@pytest.mark.parametrize(("save", "restart"), [(300, 600), (60, 0)])
def test_the_mean_time_is_that_of_daly(save: float, restart: float) -> None:
    mtbf = 4 * HOUR
    every = best_interval(save, mtbf)
    job = Job("job", 16, 40 * every, pause=save, every=every)
    cluster = Cluster(16, (replace(STOP, seconds=(restart, restart)),))
    times = [simulate(cluster, [[job]], seed).seconds for seed in range(400)]
    expected = expected_seconds(job.work, every, save, restart, mtbf)
    error = stdev(times) / math.sqrt(len(times))
    assert error < 0.005 * expected
    assert abs(fmean(times) - expected) < 3.5 * error


def test_optima() -> None:
    assert young_interval(50, 3600) == 600
    # Daly 2006, figures 3 to 5: 5 min to save, and a failure every 24 h, 6 h and 15 min.
    for mtbf, minutes in ((24 * HOUR, 117), (6 * HOUR, 57), (900, 9.1)):
        assert best_interval(300, mtbf) / 60 == pytest.approx(minutes, rel=0.03)
    assert math.isinf(best_interval(300, math.inf))
    best = best_interval(300, 6 * HOUR)
    around = [expected_seconds(1e6, best * factor, 300, 600, 6 * HOUR) for factor in (0.8, 1, 1.25)]
    assert around[1] < min(around[0], around[2])


def test_a_seed_is_a_run() -> None:
    cluster, job = Cluster(16, (STOP,)), Job("job", 16, 100 * HOUR, pause=60)
    first, again, other = (simulate(cluster, [[job]], seed) for seed in (1, 1, 2))
    assert first == again
    assert first.seconds != other.seconds


def test_a_warned_stop_loses_no_work_and_queues_without_gpus() -> None:
    preempted = Fault("preemption", 1 / (4 * 16), (60, 60), is_warned=True, gives_up="all")
    outcome = simulate(Cluster(16, (preempted,), queue=1800), [[Job("job", 16, 40 * HOUR, every=10 * HOUR)]])
    ran = outcome.jobs[0]
    assert ran.stops > 0
    assert ran.lost == 0
    assert ran.waiting > 0
    assert ran.held / 16 == pytest.approx(40 * HOUR + 60 * ran.stops)
    assert outcome.seconds == pytest.approx(ran.held / 16 + ran.waiting)


def test_without_a_spare_node_a_job_waits_for_the_repair() -> None:
    broken = replace(STOP, gives_up="node", seconds=(0, 0))
    job = Job("job", 16, 40 * HOUR, every=HOUR)
    repaired, spared = (
        simulate(Cluster(16, (broken,), spare_gpus=spare, repair=24 * HOUR), [[job]], 3).jobs[0] for spare in (0, 800)
    )
    assert spared.down == 0
    assert repaired.stops > 0
    assert repaired.down == pytest.approx(24 * HOUR * repaired.stops)


def test_a_straggler_slows_its_own_job_alone() -> None:
    slow = Fault("straggler", 1 / (10 * 16), (HOUR, HOUR), slows_to=0.5)
    ran = simulate(Cluster(16, (slow,)), [[Job("job", 16, 1000 * HOUR, every=1000 * HOUR)]]).jobs[0]
    assert ran.stops == 0
    # About one hour in ten at half speed; a second one while the first is there adds less.
    assert 0.03 < ran.slow / ran.training < 0.06
    halves = [Job(f"half-{number}", 8, 1000 * HOUR, every=1000 * HOUR) for number in range(2)]
    parted = simulate(Cluster(16, (slow,)), [halves])
    assert all(half.slow / half.training < 0.75 * ran.slow / ran.training for half in parted.jobs)


def test_independent_jobs_lose_what_one_of_them_lost() -> None:
    work, gpus = 300 * HOUR, 1024
    cluster = Cluster(gpus, (Fault("stop", 1e-4, (600, 600)),))
    one = [simulate(cluster, [[Job("one", gpus, work, pause=30)]], seed) for seed in range(5)]
    many = [
        simulate(cluster, [[Job(f"job-{number}", 8, work, pause=30) for number in range(128)]], seed)
        for seed in range(2)
    ]
    assert min(outcome.goodput for outcome in many) > max(outcome.goodput for outcome in one)
    assert all(outcome.seconds_of(0.5) < outcome.seconds for outcome in many)


def test_llama_3_spends_more_than_nine_tenths_of_its_time_training() -> None:
    """419 unexpected and 47 planned stops in 54 days; `more than 90 %` was published (arXiv 2407.21783)."""
    cluster, job = llama_3()
    outcomes = [simulate(cluster, [[job]], seed) for seed in range(3)]
    per_day = [outcome.stops / (outcome.seconds / 86400) for outcome in outcomes]
    assert fmean(per_day) == pytest.approx((419 + 47) / 54, rel=0.1)
    assert 0.90 < fmean(outcome.goodput for outcome in outcomes) < 0.95
    cluster, job = llama_3(restart=1200)  # twice as long would not have reached it
    assert simulate(cluster, [[job]]).goodput < 0.9


def test_byterobust_spends_97_percent_of_its_time_training() -> None:
    """175 incidents in three months on 9,600 GPUs; 97 % was published (arXiv 2509.16293)."""
    cluster, job = byterobust()
    outcomes = [simulate(cluster, [[job]], seed) for seed in range(3)]
    assert fmean(outcome.goodput for outcome in outcomes) == pytest.approx(0.97, abs=0.01)


def test_a_plan_is_simulated(tmp_path) -> None:
    config = tiny_config(tmp_path)
    assumed = assumptions_of(["gpus=64", "seeds=2", "failures_per_gpu_hour=1e-3", "mfu=0.5", "checkpoint_minutes=null"])
    cluster = cluster_of(config, assumed)
    phases = phases_of(config, cluster, assumed)
    assert [len(phase) for phase in phases][:2] == [1, config.experts.count]
    assert phases[1][0].gpus == 64 // config.experts.count
    single = one_job(config, cluster, assumed, phases)
    assert single.work * 64 == pytest.approx(sum(job.work * job.gpus for phase in phases for job in phase))
    text = describe_simulation(config, ["gpus=64", "seeds=2"])
    assert "(Young)" in text
    assert "this run" in text
    assert describe_simulation(config, ["gpus=64", "seeds=2"]) == text


def test_a_plan_of_jobs_shorter_than_their_start_says_that_goodput_says_little(tmp_path) -> None:
    words = "shorter than the 2 min that a job takes to queue and start (queue_minutes, start_minutes)"
    config = tiny_config(tmp_path)
    short = describe_simulation(config, ["gpus=1", "seeds=2"])
    assert short.startswith("assumed on 1 GPU: ")
    assert "on 1 GPU, a checkpoint" in short
    assert "1 GPUs" not in short
    assert "GPU(s)" not in short
    assert f"backbone, 3 x expert, assemble: {words}" in short
    assert words not in describe_simulation(config, ["gpus=1", "seeds=2", "start_minutes=0"])
    slow = describe_simulation(config, ["gpus=1", "seeds=2", "peak_teraflops=1e-6", "failures_per_gpu_hour=0"])
    assert "so that goodput says little" not in slow


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gpus", "takes NAME=VALUE"),
        ("gpus=many", "gpus must be a whole number"),
        ("mfu=2", "mfu must be"),
        ("walls=2", "walls is unknown; there are gpus"),
        ("failures_per_gpu_hour=1e3", "would never end"),
    ],
)
def test_a_wrong_assumption_is_a_sentence(tmp_path, change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        describe_simulation(tiny_config(tmp_path), [change])


def test_every_assumption_is_explained() -> None:
    assert all(field.description for field in Assumptions.model_fields.values())
