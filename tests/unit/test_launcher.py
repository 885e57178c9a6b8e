"""What the launcher decides without Slurm: the graph, arrays, retries, identities, environments, scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from checkpoints import paths
from launcher import slurm
from launcher.__main__ import app as launcher
from launcher.allocation import Allocation
from launcher.arrays import cut, ranges
from launcher.command import child_environment, job_environment, processes_of, training_command
from launcher.layout import log_file
from launcher.lock import BusyError, submission_lock
from launcher.node import spread_start
from launcher.plan import describe_plan
from launcher.preflight import _node_problems, _queue_limit, _storage_problems
from launcher.processes import LocalLauncher
from launcher.record import Submission, beside, check_same_run, identity_of, new_record, run_id_of, save_record
from launcher.report import lost_steps, sessions
from launcher.retry_policy import Ended, decide
from launcher.sbatch import Request, dependency, script_of
from launcher.slurm import QueuedJob, SlurmError, minutes
from launcher.submit import find_job, live_tasks
from launcher.tasks import build_groups, build_tasks, nodes_of
from modularforge.config import ClusterConfig
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError, MismatchError
from tests.conftest import ROOT, tiny_config

CRASH, STOP = Ended(1), Ended(130)
CLUSTER = ClusterConfig(max_crashes=2, max_time_limits=1, warning_seconds=120)


def requeued(reason: str, step: int = 0) -> dict[str, Any]:
    return {"job": "expert-0", "event": "requeued", "time": 0.0, "reason": reason, "step": step}


def test_groups_wait_for_each_other_in_the_order_of_the_pipeline(tmp_path: Path) -> None:
    groups = {group.name: group for group in build_groups(build_tasks(tiny_config(tmp_path)))}
    assert list(groups) == ["prepare-data", "backbone", "expert", "dense", "assemble", "evaluate"]
    assert groups["expert"].after == ("backbone",)
    assert groups["assemble"].after_end == ("expert",), "a failed expert must not keep the assembly from deciding"
    assert groups["evaluate"].after == ("dense", "assemble")


def test_baselines_are_jobs_of_their_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, evaluation={"baselines": ["btx", "dense", "dense_wide", "joint", "joint_evidence"]})
    groups = {group.name: group for group in build_groups(build_tasks(config))}
    mixed = ["dense", "dense_wide", "joint", "joint_evidence"]
    assert list(groups) == ["prepare-data", "backbone", "expert", *mixed, "branch", "assemble", "evaluate"]
    assert [task.index for task in groups["branch"].tasks] == [0, 1, 2]
    assert groups["branch"].tasks[2].arguments == ("branch", "--index", "2")
    assert groups["evaluate"].after == (*mixed, "branch", "assemble")
    assert nodes_of(config, "branch") == config.cluster.expert
    assert all(nodes_of(config, name) == config.cluster.backbone for name in mixed)


@given(
    indices=st.sets(st.integers(0, 5000), min_size=1, max_size=300),
    size=st.integers(1, 1001),
    throttle=st.one_of(st.none(), st.integers(1, 400)),
)
def test_pieces_hold_every_index_once_and_never_exceed_the_throttle(
    indices: set[int], size: int, throttle: int | None
) -> None:
    pieces = cut(list(indices), size, throttle)
    assert sorted(index for piece in pieces for index in piece.indices) == sorted(indices)
    assert all(0 <= index - piece.offset < size for piece in pieces for index in piece.indices)
    if throttle is not None:
        lanes: dict[int, int] = {}
        for number, piece in enumerate(pieces):
            lane = number if piece.after is None else next(k for k in lanes if (number - k) % len(lanes) == 0)
            lanes[lane] = max(lanes.get(lane, 0), piece.throttle or 0)
        assert sum(lanes.values()) <= throttle
        assert all(piece.throttle for piece in pieces)


def test_ranges_are_written_as_sbatch_reads_them() -> None:
    assert ranges([7, 0, 1, 2, 9]) == "0-2,7,9"


@pytest.mark.parametrize(
    ("ended", "history", "again", "reason"),
    [
        (replace(STOP, was_preempted=True), [requeued("preempted")] * 50, True, "preempted"),
        (replace(STOP, run_minutes=58, limit_minutes=60), [], True, "time limit"),
        (replace(STOP, run_minutes=58, limit_minutes=60), [requeued("time limit")], False, "time limit"),
        (replace(STOP, run_minutes=5, limit_minutes=60), [requeued("time limit")], True, "stopped by a signal"),
        (replace(STOP, state="COMPLETING"), [], False, "cancelled"),
        (replace(STOP, state="ASKED_TO_STOP"), [], False, "cancelled"),
        (replace(STOP, code=143), [], True, "stopped by a signal"),
        (CRASH, [], True, "crashed"),
        (CRASH, [requeued("crashed")], False, "failed"),
        (replace(CRASH, step=20), [requeued("crashed", 10)], True, "crashed"),
        (replace(CRASH, step=30), [requeued("crashed", 10), requeued("crashed", 20)], False, "failed"),
        (replace(CRASH, step=10), [requeued("crashed", 10), requeued("preempted", 10)], False, "failed"),
        (replace(CRASH, code=2), [], False, "failed"),
        (replace(CRASH, code=2, step=10), [], True, "crashed"),
        (replace(CRASH, code=137), [], True, "crashed"),
    ],
)
def test_a_job_starts_again_as_often_as_its_end_deserves(
    ended: Ended, history: list[dict[str, Any]], again: bool, reason: str
) -> None:
    decision = decide(ended, history, CLUSTER)
    assert (decision.again, decision.reason) == (again, reason)


def test_the_run_id_follows_from_what_decides_the_result(tmp_path: Path) -> None:
    first = tiny_config(tmp_path)
    same = tiny_config(tmp_path, cluster={"queue": "gpu"}, training={"log_every": 3}, launcher={"max_workers": 4})
    assert run_id_of(first) == run_id_of(same)
    assert run_id_of(first) != run_id_of(tiny_config(tmp_path, experts={"steps": 11}))
    assert run_id_of(first) != run_id_of(tiny_config(tmp_path / "elsewhere"))


def test_changed_settings_are_refused_by_name_and_more_partitions_are_not(tmp_path: Path) -> None:
    at_random = {"method": "random"}
    check_same_run(tiny_config(tmp_path, experts={"count": 5}), new_record(tiny_config(tmp_path, partition=at_random)))
    record = new_record(tiny_config(tmp_path))
    with pytest.raises(MismatchError, match=r"model\.width: 32 in the run, 64 now"):
        check_same_run(tiny_config(tmp_path, model={"width": 64}), record)


def test_a_changed_general_rate_is_seen_where_a_baseline_has_its_own(tmp_path: Path) -> None:
    own = {"dense": {"peak_learning_rate": 0.5}, "btx": {"peak_learning_rate": 0.25, "batch_size": 8}}
    config = tiny_config(tmp_path, **own, experts={"peak_learning_rate": 0.01})
    record = new_record(config)
    check_same_run(config, record)
    with pytest.raises(MismatchError, match=r"experts\.peak_learning_rate: 0\.01 in the run, 0\.02 now"):
        check_same_run(tiny_config(tmp_path, **own, experts={"peak_learning_rate": 0.02}), record)
    faster = {**own, "dense": {"peak_learning_rate": 0.75}, "experts": {"peak_learning_rate": 0.01}}
    with pytest.raises(MismatchError, match=r"dense\.peak_learning_rate: 0\.5 in the run, 0\.75 now"):
        check_same_run(tiny_config(tmp_path, **faster), record)
    # Earlier versions recorded the last baseline's rate as that of the experts: their runs go on.
    record.identity = {**identity_of(config), "experts.peak_learning_rate": 0.25}
    check_same_run(config, record)


def test_a_dry_run_of_a_new_run_plans_the_place_beside_the_old_one(tmp_path: Path) -> None:
    old, path = tiny_config(tmp_path / "run"), tmp_path / "config.yaml"
    save_record(old, new_record(old))
    path.write_text(to_yaml(tiny_config(tmp_path / "run", experts={"steps": 99})))
    for options, where in (([], f"{old.output_dir}\n"), (["--new-run"], f"{old.output_dir}-")):
        done = CliRunner().invoke(launcher, ["launch", "--dry-run", *options, "--config", str(path)])
        assert done.exit_code == 0, done.output
        assert f" at {where}" in done.output
    assert not [*tmp_path.glob("run-*")]


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (3, 2)])
def test_threads_are_a_share_of_a_jobs_cores_whatever_the_shell_says(
    processes: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    config = tiny_config(tmp_path, launcher={"backbone_processes": processes})
    task = next(task for task in build_tasks(config) if task.name == "backbone")
    here = LocalLauncher(config, [task], print)
    monkeypatch.setattr(here, "_cores", lambda task: 8)
    here.carriers["backbone"] = Submission("000-backbone-ab", "backbone", job="local-1")
    for name in set(os.environ) - set(started := here._environment(task, 0)):
        monkeypatch.delenv(name)
    allocation = here._allocation(task, 0)
    found = child_environment(config, processes_of(config, task, allocation), allocation)
    assert "OMP_NUM_THREADS" not in started
    assert found["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 1), ("fsdp", 4)])
def test_a_calibration_has_the_gpus_of_its_job_where_models_are_in_pieces(
    parallel: str, processes: int, tmp_path: Path
) -> None:
    cluster = {"other": {"gpus": 4, "nodes": 1}}
    config = tiny_config(tmp_path, cluster=cluster, training={"parallel": parallel})
    tasks = {task.name: task for task in build_tasks(config)}
    allocation = Allocation("1", "1", None, 0, 1, "node1", 8, 4, None)
    assert processes_of(config, tasks["assemble"], allocation) == processes
    assert processes_of(config, tasks["evaluate"], allocation) == 1
    command = " ".join(training_command(config, tasks["assemble"], allocation, []))
    assert ("--nproc-per-node=4" in command) == (processes == 4)


def test_a_new_run_lies_beside_the_old_one_and_shares_unchanged_data(tmp_path: Path) -> None:
    old = tiny_config(tmp_path / "run")
    other = beside(tiny_config(tmp_path / "run", experts={"steps": 99}), new_record(old))
    assert other.output_dir.startswith(f"{old.output_dir}-")
    assert other.data_url == old.data_url
    assert beside(tiny_config(tmp_path / "run", seed=7), new_record(old)).data_url != old.data_url


def test_min_experts_above_the_number_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.min_experts must be at most experts\.count \(3\), but is 4"):
        tiny_config(tmp_path, cluster={"min_experts": 4})


def test_a_jobs_environment_has_what_is_named_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "GITHUB_TOKEN", "SLURM_JOB_ID", "SLURM_CONF", "RANK", "MASTER_ADDR", "PMI_RANK"):
        monkeypatch.setenv(name, "x")
    found = job_environment(["AWS_*", "SLURM_*"])
    assert {"AWS_PROFILE", "SLURM_CONF", "PATH"} <= set(found)
    assert not {"GITHUB_TOKEN", "SLURM_JOB_ID", "RANK", "MASTER_ADDR", "PMI_RANK"} & set(found)


def test_a_script_asks_for_what_the_settings_say(tmp_path: Path) -> None:
    settings = {
        "queue": "gpu", "account": "lab", "expert": {"gpus": 1, "cpus": 8, "memory_gb": 1.5, "time_minutes": 90},
        "warning_seconds": 60, "setup": ["module load cuda"], "sbatch_options": {"reservation": "spring"},
    }  # fmt: skip
    config = tiny_config(tmp_path, cluster=settings)
    request = Request("expert", "key", "0123456789abcdef", tmp_path, cut([3, 4], 1001, 2)[0], ("7",), ("8", "9"))
    script = script_of(config, request)
    for option in (
        "--partition=gpu", "--account=lab", "--gpus-per-node=1", "--cpus-per-task=8", "--mem=1536MB", "--time=90",
        "--signal=USR2@60", "--array=3-4%2", "--requeue", "--open-mode=append", "--reservation=spring",
        "--dependency=afterok:7,afterany:8:9", "--comment=modularforge:0123456789abcdef:key",
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in script
    assert "wckey" not in script
    assert script.index("module load cuda") < script.index("launcher.node expert")


def test_a_plan_names_all_jobs_and_hours(tmp_path: Path) -> None:
    text = describe_plan(tiny_config(tmp_path, cluster={"backbone": {"nodes": 2, "gpus": 8, "time_minutes": 30}}))
    assert "asks for at most 16.0 GPU-hours" in text, "dense has the backbone's nodes"
    assert "afterok:<backbone>" in text


def test_jobs_without_an_answer_are_found_by_comment_or_by_their_own_word() -> None:
    queued = [QueuedJob("12", None, "PENDING", "", "", "Priority", "modularforge:run:key-a")]
    assert find_job("run", "key-a", queued, {}) == "12"
    assert find_job("run", "key-b", queued, {"expert-0": [{"key": "key-b", "slurm_job": "13_0"}]}) == "13"
    assert find_job("run", "key-c", queued, {}) is None


def test_a_job_past_its_last_word_or_without_a_chance_carries_nothing() -> None:
    record = new_record(tiny_config("/nowhere"))
    record.submissions = [Submission("a", "expert", [4, 5], 4, "12"), Submission("b", "assemble", job="13")]
    jobs = [
        QueuedJob("12", 0, "COMPLETING", "", "", "None", ""),
        QueuedJob("12", 1, "RUNNING", "", "", "None", ""),
        QueuedJob("13", None, "PENDING", "", "", "DependencyNeverSatisfied", ""),
    ]
    events = {"expert-4": [{"job": "expert-4", "event": "ended", "time": 1.0, "slurm_job": "12_0"}]}
    assert live_tasks(record, jobs, events) == {"expert-5": "12"}


def test_dependencies_are_written_as_sbatch_reads_them(tmp_path: Path) -> None:
    assert dependency(Request("expert", "k", "r", tmp_path)) is None
    assert dependency(Request("expert", "k", "r", tmp_path, None, ("1",), ("2",))) == "afterok:1,afterany:2"


def test_the_preflight_tries_what_the_storage_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("memory://preflight/run", cluster={"work_dir": str(tmp_path / "work")})
    assert list(_storage_problems(config, "", [])) == []
    assert paths.walk("memory://preflight") == [], "nothing is left behind"
    shutil.rmtree(tmp_path / "work")
    (tmp_path / "work").touch()
    monkeypatch.setattr(paths, "create_bytes", paths.replace_bytes)
    monkeypatch.setattr(paths, "remove", lambda url: None)
    found = list(_storage_problems(config, "", []))
    for problem, words in zip(
        found, ("refuse to create a file twice", "let files be deleted", "work_dir"), strict=True
    ):
        assert words in problem


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_busy_cluster_is_a_note_and_a_broken_python_a_problem(
    is_busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "Unable to allocate resources: Requested nodes are busy" if is_busy else "No module named torch"
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho 'srun: error: {said}' >&2\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    notes: list[str] = []
    problems = list(_node_problems(tiny_config(tmp_path), "", notes))
    assert [len(notes), len(problems)] == ([1, 0] if is_busy else [0, 1])
    assert said in (notes + problems)[0]


def test_a_command_of_slurm_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SlurmError, match=r"sleep must answer within 0.2 s"):
        slurm.run_slurm("sleep", "30")


def test_times_of_slurm_are_read() -> None:
    assert minutes("1-02:03:30") == 1563.5
    assert minutes("05:30") == 5.5
    assert minutes("UNLIMITED") == float("inf")


def test_log_files_have_the_names_that_slurm_gives_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert log_file(config, "expert", 7).name == "expert-7.log"
    assert log_file(config, "expert", 1007, 1001).name == "expert-1001+6.log"


def test_runs_that_share_a_work_folder_do_not_share_their_logs(tmp_path: Path) -> None:
    cluster = {"work_dir": str(tmp_path / "work")}
    first, other = tiny_config(tmp_path / "run", cluster=cluster), tiny_config("s3://bucket/run", cluster=cluster)
    beside_it = beside(first, new_record(first))
    logs = {log_file(config, "backbone") for config in (first, beside_it, other)}
    assert len(logs) == 3
    assert all(path.is_relative_to(tmp_path / "work") for path in logs)


def test_lost_work_and_running_time_follow_from_the_events() -> None:
    events = [
        {"event": "started", "time": 10.0, "step": 0, "last_step": 0},
        {"event": "requeued", "time": 20.0, "reason": "preempted"},
        {"event": "started", "time": 30.0, "step": 5, "last_step": 5},
        {"event": "requeued", "time": 90.0, "reason": "by Slurm"},
        {"event": "started", "time": 90.0, "step": 10, "last_step": 14, "last_time": 50.0},
        {"event": "ended", "time": 100.0},
    ]
    assert sessions(events) == [(10.0, 20.0), (30.0, 50.0), (90.0, 100.0)]
    assert lost_steps(events) == 4


def test_of_several_queues_the_most_generous_limits_the_time() -> None:
    queues = {"short": {"MaxTime": "01:00:00"}, "long": {"MaxTime": "1-00:00:00", "Default": "YES"}}
    limits = {None: 1440.0, "short": 60.0, "short,long": 1440.0}
    for queue, limit in limits.items():
        assert _queue_limit(tiny_config("run", cluster={"queue": queue}), queues) == limit


def test_a_second_launcher_waits_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    with submission_lock(config), pytest.raises(BusyError, match=f"process id {os.getpid()}"), submission_lock(config):
        pass
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    lock = tmp_path / "run" / "cluster" / "lock.json"
    host = os.uname().nodename
    lock.write_text(f'{{"host": "{host}", "pid": {child.pid}, "time": 0, "token": ""}}')
    with submission_lock(config):
        assert f'"pid": {os.getpid()}' in lock.read_text()
    assert not lock.exists()


def test_of_two_launchers_that_take_over_a_dead_ones_lock_only_the_last_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, host = tmp_path / "run" / "cluster" / "lock.json", os.uname().nodename
    lock.parent.mkdir(parents=True)
    lock.write_text(f'{{"host": "{host}", "pid": 999999999, "time": 0, "token": ""}}')
    rivals = json.dumps({"host": host, "pid": os.getpid(), "time": 0, "token": "rival"})
    monkeypatch.setattr("launcher.lock.time.sleep", lambda _seconds: lock.write_text(rivals))
    with pytest.raises(BusyError, match="another launcher was faster"), submission_lock(tiny_config(tmp_path / "run")):
        pass
    assert lock.read_text() == rivals


def test_a_lock_of_another_machine_counts_while_its_holder_renews_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.lock.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("launcher.lock.SETTLE_SECONDS", 0.0)
    config, lock = tiny_config(tmp_path / "run"), tmp_path / "run" / "cluster" / "lock.json"
    with submission_lock(config):
        begun = json.loads(lock.read_text())["time"]
        deadline = time.monotonic() + 20
        while json.loads(lock.read_text())["time"] == begun and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(lock.read_text())["time"] > begun
    elsewhere = {"host": "elsewhere", "pid": 1, "token": "theirs"}
    lock.write_text(json.dumps(elsewhere | {"time": time.time()}))
    with pytest.raises(BusyError, match="on 'elsewhere'"), submission_lock(config):
        pass
    lock.write_text(json.dumps(elsewhere | {"time": time.time() - 601}))
    with submission_lock(config):
        assert "elsewhere" not in lock.read_text()


def test_torchrun_ends_with_the_code_of_its_process(tmp_path: Path) -> None:
    from modularforge.training.elastic import main

    script = tmp_path / "script.py"
    for code, expected in (("0", 0), ("7", 7), ("130", 130)):
        script.write_text(f"import sys; sys.exit({code})")
        assert main(["--standalone", "--nproc-per-node=1", str(script)]) == expected


def test_help_is_quick_and_lists_the_subcommands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in ("launch", "plan", "status", "logs", "cancel", "resume", "wait"):
        assert name in done.stdout


def test_node_programs_refuse_to_run_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.allocation import Allocation

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match="must run in a Slurm job"):
        Allocation.of_this_job(None)


@pytest.mark.parametrize("change", [{"pid": 0}, {"pid": -1}, {"command": "of another program"}])
def test_a_lock_of_this_machine_counts_only_while_its_own_process_lives(tmp_path: Path, change: dict[str, Any]) -> None:
    """After a restart of the machine another program may have the number that the launcher had."""
    config, lock = tiny_config(tmp_path / "run"), tmp_path / "run" / "cluster" / "lock.json"
    with submission_lock(config):
        holder = json.loads(lock.read_text())
    lock.write_text(json.dumps(holder))
    with pytest.raises(BusyError), submission_lock(config):
        pass
    lock.write_text(json.dumps({**holder, **change}))
    with submission_lock(config):
        assert json.loads(lock.read_text())["token"] != holder["token"]


def test_a_lock_counts_where_the_machine_hides_the_commands_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    with submission_lock(config):
        monkeypatch.setattr("launcher.lock.command_of", lambda _pid: None)
        with pytest.raises(BusyError), submission_lock(config):
            pass


@pytest.mark.parametrize(
    ("count", "place", "longest"), [(10_000, "s3://b/run", 71), (500, "s3://b/run", 0), (10_000, "run", 0)]
)
def test_thousands_of_jobs_on_an_object_store_begin_at_moments_of_chance(count, place, longest, monkeypatch) -> None:
    config = tiny_config(place)
    config = config.model_copy(update={"experts": config.experts.model_copy(update={"count": count})})
    slept: list[float] = []
    monkeypatch.setattr("launcher.node.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("launcher.node.random", SimpleNamespace(uniform=lambda least, most: most))
    backbone, *_ = (task for task in build_tasks(config) if task.group == "backbone")
    expert = next(task for task in build_tasks(config) if task.index == 7)
    spread_start(config, backbone)
    spread_start(config, expert)
    assert [int(seconds) for seconds in slept] == ([longest] if longest else [])
