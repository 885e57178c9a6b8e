"""A run is seen from any folder and machine that reaches it, without Slurm too, and when people started its jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoints import paths
from launcher import node, own_log, preflight, processes, runs, slurm, status
from launcher.__main__ import app
from launcher.allocation import Allocation
from launcher.events import append_event
from launcher.layout import stored_log_url, work_folder
from launcher.own_log import last_bytes, tail_beside_run
from launcher.preflight import _wishes_too_big
from launcher.record import Record, Submission, load_record, new_record, save_record
from launcher.runs import cancel_one, find_log, follow_status, recorded, rerun, tail
from launcher.slurm import SlurmError
from launcher.status import describe, is_going_on, known_status, where_it_is
from launcher.tasks import build_groups, build_tasks
from launcher.trust import check_commands
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError
from modularforge.run import Run
from tests.conftest import tiny_config

NO_CONTROLLER = "squeue must succeed, but said: Unable to contact slurm controller"


def no_slurm(*_: str, **__: Any) -> str:
    raise SlurmError(NO_CONTROLLER)


def listing(*lines: str) -> Callable[..., str]:
    return lambda *words, **_: "\n".join(lines) if words[0] == "squeue" else ""


@pytest.fixture
def remote(tmp_path: Path) -> Config:
    """A run on an object store, two of whose experts were submitted from another folder than this."""
    config = tiny_config(f"memory://{tmp_path.name}/run")
    record = new_record(config)
    record.cluster, record.work_folder = "jureca", "/there/modularforge-jobs/run-12345678"
    work = "run-12345678"
    record.submissions = [Submission("000-expert-ab", "expert", [0, 1, 2], job="12", work=work)]
    save_record(config, record)
    for index, place in ((0, "/there/x/expert-0.log"), (1, "")):
        append_event(config, f"expert-{index}", "started", slurm_job=f"12_{index}", key="000-expert-ab", log=place)
    append_event(config, "expert-1", "ended", slurm_job="12_1", code=1, reason="failed")
    return config


def test_without_slurm_the_status_is_what_the_store_knows(
    remote: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slurm, "run_slurm", no_slurm)
    monkeypatch.setattr(status.logger, "propagate", True)
    config, record = recorded(remote)
    rows = {row.task: row for row in known_status(config, record)}
    assert (rows["expert-0"].state, rows["expert-0"].reason[:3]) == ("started", "at ")
    assert rows["expert-1"].state == "failed"
    assert (rows["expert-2"].state, rows["expert-2"].reason) == ("submitted", "to jureca")
    assert is_going_on([rows["expert-2"]])
    assert f"Slurm not reachable from here ({NO_CONTROLLER})" in caplog.text
    assert where_it_is(record) == "started on jureca, logs in /there/modularforge-jobs/run-12345678"
    assert "started" in describe(config, list(rows.values()))


def test_status_and_wait_need_neither_slurm_nor_settings(remote: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run_slurm", no_slurm)
    done = CliRunner().invoke(app, ["status", "--output-dir", remote.output_dir])
    assert done.exit_code == 0, done.output
    assert "the run was started on jureca, logs in /there" in done.output
    monkeypatch.setattr("launcher.runs.time.sleep", lambda _: None)
    following = follow_status(remote)
    assert next(following)[4].state == "submitted"
    append_event(remote, "expert-2", "started", slurm_job="12_2", key="000-expert-ab")
    assert next(following)[4].state == "started", "it is asked for again and again"


def test_a_log_is_looked_for_where_the_job_said_and_then_beside_the_run(
    remote: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slurm, "run_slurm", no_slurm)
    assert str(find_log(remote, "expert/0")) == "/there/x/expert-0.log"
    assert str(find_log(remote, "expert/2")) == "/there/modularforge-jobs/run-12345678/logs/expert-2.log"
    with pytest.raises(ConfigError, match="the job has not started, or its log is on another machine"):
        list(tail(remote, "expert/0", follow=False))
    paths.replace_bytes(stored_log_url(remote, "expert-0"), b"step 10\nstep 20\n")
    text = "".join(tail(remote, "expert/0", follow=False))
    assert text == "(the last lines; the whole log is /there/x/expert-0.log where the job runs)\nstep 10\nstep 20\n"
    done = CliRunner().invoke(app, ["logs", "expert", "0", "--output-dir", remote.output_dir])
    assert "step 20" in done.output


def test_a_job_keeps_the_end_of_its_log_beside_a_run_on_an_object_store(
    remote: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    log.write_text("the beginning\n")
    monkeypatch.setattr(own_log, "own_log", lambda: str(log))
    with tail_beside_run(remote, "expert-2"):
        log.write_text("the beginning\nhttps://me:secret@host/x\nthe end\n")
    kept = paths.read_bytes(stored_log_url(remote, "expert-2")).decode()
    assert kept.endswith("the end\n")
    assert "secret" not in kept
    log.write_text("".join(f"line {number:05d}\n" for number in range(20_000)))
    assert last_bytes(log).startswith(b"line "), "a whole line"
    assert len(last_bytes(log)) <= own_log.TAIL_BYTES
    local = tiny_config(tmp_path / "run")
    with tail_beside_run(local, "expert-2"):
        pass
    assert not (tmp_path / "run").exists(), "a run on a disk has its logs there"


def test_a_program_knows_the_file_that_its_words_go_to(tmp_path: Path) -> None:
    program = "import sys; from launcher.own_log import own_log; sys.stderr.write(own_log())"
    with open(tmp_path / "slurm-12.log", "w") as file:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=file, stderr=subprocess.PIPE, text=True, check=True
        )
    assert done.stderr == str(tmp_path / "slurm-12.log")
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert piped.stderr == ""


def test_jobs_that_people_submit_by_hand_have_a_status_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    log = tmp_path / "slurm-train-experts-34_1.log"
    log.write_text("it trains\n")
    monkeypatch.setattr(node, "own_log", lambda: str(log))
    task = next(task for task in build_tasks(config) if task.name == "expert-1")
    allocation = Allocation("35", "34", 1, 0, 1, "node7", 1, 0, 1)
    node._note_start(config, task, allocation, [], key="")
    monkeypatch.setattr(slurm, "run_slurm", listing("34|1|RUNNING|node7|N/A|None|"))
    rows = {row.task: row for row in known_status(*recorded(config))}
    assert (rows["expert-1"].state, rows["expert-1"].nodes, rows["expert-1"].job) == ("running", "node7", "34_1")
    assert rows["expert-0"].state == "missing"
    assert "".join(tail(config, "expert/1", follow=False)) == "it trains\n"
    monkeypatch.setattr(slurm, "run_slurm", listing())
    rows = {row.task: row for row in known_status(*recorded(config))}
    assert rows["expert-1"].reason == "its job ended without a word"


def test_one_job_is_cancelled_and_the_others_are_left(remote: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def squeue(*words: str, **_: Any) -> str:
        asked.append(words)
        states = ["12|0|RUNNING|n1|N/A|None|c", "12|2|PENDING||N/A|Resources|c"]
        return "\n".join(states) if words[0] == "squeue" else ""

    monkeypatch.setattr(slurm, "run_slurm", squeue)
    monkeypatch.setattr(runs, "run_slurm", squeue)
    said: list[str] = []
    cancel_one(remote, "expert/2", said.append)
    assert asked[-1] == ("scancel", "12_2")
    assert said[0].startswith("expert-2: cancelled 12_2")
    assert len(said) == 1, "nothing waits: assembly was not submitted"
    with pytest.raises(ConfigError, match="expert-1 must be going on to be cancelled, but is failed"):
        cancel_one(remote, "expert-1", said.append)
    with pytest.raises(ConfigError, match="the job must be one of prepare-data"):
        cancel_one(remote, "expert/9", said.append)


@pytest.mark.parametrize(("needed", "scancelled"), [(None, ["21", "20", "12_2"]), (2, ["12_2"])])
def test_what_cannot_start_without_a_cancelled_expert_is_cancelled_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int | None, scancelled: list[str]
) -> None:
    """Assembly waits for the end of experts, however they end: left alone it would start, and fail."""
    config = tiny_config(f"memory://{tmp_path.name}/run", cluster={"min_experts": needed})
    record = new_record(config)
    record.submissions = [
        Submission("000-expert-ab", "expert", [0, 1, 2], job="12"),
        Submission("001-assemble-ab", "assemble", job="20"),
        Submission("002-evaluate-ab", "evaluate", job="21"),
    ]
    save_record(config, record)
    asked: list[str] = []

    def answer(*words: str, **_: Any) -> str:
        asked.extend(words[1:] if words[0] == "scancel" else ())
        waiting = [f"{job}|N/A|PENDING||N/A|Dependency|c" for job in (20, 21)]
        lines = [*(f"12|{k}|RUNNING|n1|N/A|None|c" for k in range(3)), *waiting]
        return "\n".join(lines) if words[0] == "squeue" else ""

    monkeypatch.setattr(slurm, "run_slurm", answer)
    monkeypatch.setattr(runs, "run_slurm", answer)
    said: list[str] = []
    cancel_one(config, "expert/2", said.append)
    assert asked == scancelled
    if needed is None:
        assert said[1] == "assemble, evaluate: cannot start without expert-2; the same command submits what is missing"
        assert said[2].endswith("--cluster --set cluster.min_experts=2`, then cancel it again")
    else:
        assert len(said) == 1, "the other two are enough"


def test_a_run_goes_on_in_the_work_folder_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch, resume or rerun from another folder made a second one there, in which nobody looks."""
    config = tiny_config(f"memory://{tmp_path.name}/run")
    (there := tmp_path / "there").mkdir()
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(there)
    first = work_folder(config)
    first.mkdir(parents=True)
    record = new_record(config)
    record.work_folder = str(first)
    monkeypatch.chdir(here)
    assert work_folder(config) != first
    again = runs.with_its_folder(config, record)
    assert work_folder(again) == first
    check_commands(config, again)
    foreign = config.model_copy(update={"cluster": config.cluster.model_copy(update={"work_dir": "/usr"})})
    with pytest.raises(ConfigError, match=r"cluster\.work_dir in the record"):
        check_commands(config, foreign)
    chosen = config.model_copy(update={"cluster": config.cluster.model_copy(update={"work_dir": str(here)})})
    assert runs.with_its_folder(chosen, record) == chosen, "a place that is named counts"
    shutil.rmtree(first)
    assert runs.with_its_folder(config, record) == config, "on a machine that does not see it"


def test_one_job_of_this_machine_is_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "run")
    record = new_record(config)
    record.submissions = [Submission("000-expert-ab", "expert", [0, 1, 2], job="local-1")]
    save_record(config, record)
    with subprocess.Popen(["sleep", "600"]) as job:
        append_event(config, "expert-2", "started", slurm_job="local-1_2", key="000-expert-ab", pid=job.pid)
        monkeypatch.setattr(processes, "command_of", lambda pid: "python run.py --key 000-expert-ab")
        said: list[str] = []
        cancel_one(config, "expert/2", said.append)
        assert said[0].startswith("expert-2: asked to stop; it saves its state")
        assert job.wait(20) < 0, "a signal ended it"
    with pytest.raises(ConfigError, match="expert-0 must be running to be cancelled"):
        cancel_one(config, "expert/0", lambda _: None)


def test_a_finished_expert_is_made_again_with_what_was_made_of_it(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run.output_dir, tmp_path / "run")
    config = tiny_config(tmp_path / "run")
    record = new_record(config)
    record.submissions = [Submission("000-expert-ab", "expert", [0, 1, 2], job="local-1", withdrawn=True)]
    save_record(config, record)
    resumed: list[Config] = []
    monkeypatch.setattr(runs, "resume", lambda config, _say: resumed.append(config))
    with pytest.raises(ConfigError, match="rerun must name an expert or a baseline, but backbone is none"):
        rerun(config, "backbone", lambda _: None)
    said: list[str] = []
    rerun(config, "expert/2", said.append)
    run = Run(config)
    assert run.artifact("expert", 2) is None
    assert run.artifact("expert", 1) is not None
    assert run.artifact("dense") is not None
    for stage in ("assemble", "calibrate", "evaluate"):
        assert run.find(run.url(stage)) is None
    assert said[0].endswith("/evaluation"), "no model is ever left with a part missing"
    assert not list((tmp_path / "run" / "checkpoints").glob("expert-2/*"))
    assert resumed
    assert (tmp_path / "run" / "backbone" / "manifest.json").exists()


NODES = """NodeName=n1 CPUTot=64 RealMemory=257000 Gres=gpu:a100:4(S:0-1) Partitions=gpu,all State=IDLE
NodeName=n2 CPUTot=128 RealMemory=128000 Gres=(null) Partitions=cpu,all State=IDLE"""


def test_a_refused_wish_names_what_is_too_big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run_slurm", lambda *_, **__: NODES)
    wish = {"nodes": 2, "cpus": 96, "gpus": 8, "memory_gb": 500}
    config = tiny_config(tmp_path / "run", cluster={"queue": "gpu", "expert": wish})
    group = next(group for group in build_groups(build_tasks(config)) if group.name == "expert")
    queues = {"gpu": {}, "cpu": {"Default": "YES"}}
    assert list(_wishes_too_big(config, group, queues)) == [
        "cluster.expert.nodes is 2, but there are 1 in the queue (gpu): lower it",
        "cluster.expert.cpus is 96, but there are 64 on one node (gpu): lower it",
        "cluster.expert.gpus is 8, but there are 4 on one node (gpu): lower it",
        "cluster.expert.memory_gb is 500, but there are 250.977 on one node (gpu): lower it",
    ]
    small = tiny_config(tmp_path / "run", cluster={"expert": {"cpus": 96}})
    assert list(_wishes_too_big(small, group, queues)) == [], "the default queue has such nodes"
    assert preflight._gpus_of({"Gres": "gpu:2,gpu:v100:3"}) == 5


def test_jobs_that_are_refused_for_the_same_wish_are_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six sentences for two edits were seen."""

    def too_big(*_: object, **__: object) -> str:
        raise slurm.SlurmError("allocation failure: Requested node configuration is not available")

    queues = {"all": {"Default": "YES", "MaxTime": "1-00:00:00"}}
    monkeypatch.setattr(preflight, "site_settings", dict)
    monkeypatch.setattr(preflight, "partitions", lambda: queues)
    monkeypatch.setattr(preflight, "run_slurm", too_big)
    monkeypatch.setattr(slurm, "run_slurm", lambda *_, **__: NODES)
    nodes = {"backbone": {"cpus": 8}, "expert": {"cpus": 200}, "other": {"cpus": 300, "time_minutes": 5000}}
    config = tiny_config(tmp_path / "run", cluster=nodes)
    said = list(preflight._slurm_problems(config, "0123", []))
    why = "must be accepted by sbatch, but: allocation failure: Requested node configuration is not available"
    assert said[0] == "cluster.other.time_minutes must be at most the queue's 1440, but is 5000; lower it"
    assert said[1:] == [
        f"prepare-data, assemble, evaluate {why}; cluster.other.cpus is 300, but there are 128 on one node (all): "
        "lower it",
        f"backbone, dense {why}",
        f"expert {why}; cluster.expert.cpus is 200, but there are 128 on one node (all): lower it",
    ]


def test_a_job_by_hand_takes_the_settings_of_the_run_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`OUTPUT_DIR=s3://… sbatch slurm/train_experts.sh` took configs/default.yaml, and was refused by the run."""
    config = tiny_config(tmp_path / "run", experts={"count": 3})
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    ran: list[tuple[Config, list[str]]] = []
    monkeypatch.setattr(node, "spread_start", lambda *_: None)
    monkeypatch.setattr(node, "run_task", lambda own, _task, _allocation, words, *_: ran.append((own, words)))
    monkeypatch.setattr(sys, "argv", ["node", "expert", "--output-dir", config.output_dir, "--offset", "2"])
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(SystemExit):
        node.main()
    assert ran == [(config, ["--output-dir", config.output_dir])]


def test_a_launch_here_records_where_it_is(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    launcher = processes.LocalLauncher(config, [], lambda _: None)
    launcher._submit()
    record = load_record(config)
    assert isinstance(record, Record)
    assert record.cluster == os.uname().nodename
    assert record.work_folder == str(work_folder(config))


def test_a_launch_here_says_how_many_jobs_are_done_and_how_long_the_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = tiny_config(tmp_path / "run"), list[str]()
    tasks = build_tasks(config)
    launcher = processes.LocalLauncher(config, tasks, said.append)
    launcher.carriers = {task.name: Submission("k", task.group) for task in tasks}
    monkeypatch.setattr(processes, "flops_of_jobs", lambda _: {"backbone": 100.0, "expert-0": 50.0, "dense": 550.0})
    for name, now in (("prepare-data", 10.0), ("backbone", 70.0)):
        monkeypatch.setattr("launcher.processes.time.monotonic", lambda now=now: launcher.start + now)
        task = next(task for task in tasks if task.name == name)
        running = processes.Running(task, subprocess.Popen(["true"]), 0, 0)
        launcher._judge(running, running.process.wait())
    assert said[0].endswith(f"(1 of {len(tasks)} jobs)")
    assert said[1].endswith(f"(2 of {len(tasks)} jobs, about 7 min left)"), "600 of 100 FLOPs in 70 s"
