"""Submission as a transaction, arrays, retries and min_experts, with stand-ins for the experts' training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import open_artifact
from checkpoints.screen import shown_command
from launcher.lock import submission_lock
from modularforge.run import Run
from tests.cluster.conftest import Launched
from tests.cluster.slurm import wait_for
from tests.conftest import run_command

Make = Callable[..., Launched]


def started(tmp_path: Path) -> list[int]:
    """Indices of the stand-ins that ever started, once per start."""
    return sorted(int(path.name.split("-")[1]) for path in (tmp_path / "stub").glob("started-*"))


def experts_of(run: Launched) -> list[str]:
    """Ids of the experts' jobs and array tasks that have not ended."""
    listing = run.cluster.run("squeue", "-h", "-r", "-o", "%j %i")
    return [line.split()[1] for line in listing.splitlines() if line.startswith("expert-")]


def wait_for_experts(run: Launched, indices: range | list[int], seconds: float = 120) -> None:
    wait_for(lambda: all(run.has(f"experts/expert-{index}") for index in indices), "the experts are committed", seconds)


def test_an_array_above_the_limit_is_split_with_global_indices_and_one_throttle(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("finish", 14, cluster={"array_throttle": 5})
    run.submit()
    pieces = [item for item in run.submissions() if item["group"] == "expert"]
    assert [(item["indices"][0], item["indices"][-1], item["offset"]) for item in pieces] == [
        (0, 5, 0), (6, 11, 6), (12, 13, 12),
    ]  # fmt: skip
    shown = [run.cluster.run("scontrol", "show", "job", item["job"]) for item in pieces]
    throttles = [int(text.partition("ArrayTaskThrottle=")[2].split()[0]) for text in shown]
    assert sum(throttles) == 5
    wait_for_experts(run, range(14))
    assert started(tmp_path) == list(range(14))
    assert run.rows()["expert-13"]["log"].endswith("expert-12+1.log")


def launch_killed(run: Launched, tools: Path, written: int) -> None:
    """Launch with an sbatch that kills the launcher before (odd) or after (even) submission `written // 2`."""
    tools.mkdir()
    counter = tools / "counter"
    (tools / "sbatch").write_text(
        "#!/bin/bash\n"
        f"echo x >> {counter}\nreal=$(PATH=${{PATH#*:}} type -P sbatch)\n"
        f'"$real" "$@"; code=$?\n'
        f'if [ "$(wc -l < {counter})" = {written // 2 + 1} ]; then kill -9 $PPID; fi\nexit $code\n'
    )
    (tools / "sbatch").chmod(0o755)
    run.environment = {"PATH": f"{tools}:{run.cluster.environ['PATH']}"}
    if written % 2:  # killed before sbatch did anything
        text = (
            (tools / "sbatch").read_text().replace('"$real" "$@"; code=$?\n', "").replace("fi\n", 'fi\n"$real" "$@"\n')
        )
        (tools / "sbatch").write_text(text)
    process = run.start("--cluster", "--no-preflight")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    run.environment = {}


@pytest.mark.parametrize("written", [0, 2, 3, 5])
def test_a_launcher_killed_while_submitting_leaves_nothing_lost_or_doubled(
    stub_run: Make, tmp_path: Path, written: int
) -> None:
    """Killed by sbatch itself in place of its n-th submission's answer; then the same command again."""
    run = stub_run("finish")
    launch_killed(run, tmp_path / "tools", written)
    run.submit()
    groups = [item["group"] for item in run.submissions() if not item["withdrawn"]]
    assert groups == ["expert", "assemble", "evaluate"]
    names = run.cluster.run("squeue", "-h", "-t", "all", "-o", "%j %F %T").splitlines()
    mine = {line for line in names if any(item["job"] == line.split()[1] for item in run.submissions())}
    assert len({line.split()[1] for line in mine}) == 3
    wait_for_experts(run, range(3))
    assert started(tmp_path) == [0, 1, 2]


def test_cancel_finds_the_job_of_a_launcher_that_was_killed_before_it_heard_of_it(
    stub_run: Make, tmp_path: Path
) -> None:
    run = stub_run("hold")
    launch_killed(run, tmp_path / "tools", 0)
    assert [item["job"] for item in run.submissions()] == [None]
    assert run.cluster.jobs()
    with submission_lock(run.config):  # the killed one's is taken over
        assert "is submitting this run" in run.launcher("cancel", code=2)
    assert "expert: cancelled" in run.launcher("cancel")
    assert not run.cluster.jobs()


def test_an_sbatch_that_times_out_after_submitting_is_found_in_the_queue(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("finish")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        "#!/bin/bash\n"
        'real=$(PATH=${PATH#*:} type -P sbatch)\n"$real" "$@" > /dev/null\n'
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2\nexit 1\n'
    )
    (tools / "sbatch").chmod(0o755)
    run.environment = {"PATH": f"{tools}:{run.cluster.environ['PATH']}"}
    run.submit()
    assert len({item["job"] for item in run.submissions()}) == 3
    wait_for_experts(run, range(3))
    assert started(tmp_path) == [0, 1, 2]


def test_a_job_that_another_replaced_ends_at_once(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("finish")
    run.cluster.run("scontrol", "update", "partitionname=main", "state=down")
    try:
        run.submit()
        script = next(path for path in (run.folder / "cluster" / "scripts").iterdir() if "expert" in path.read_text())
        double = run.cluster.run("sbatch", "--parsable", str(script)).strip()
    finally:
        run.cluster.run("scontrol", "update", "partitionname=main", "state=up")
    wait_for_experts(run, range(3))
    wait_for(lambda: double not in " ".join(run.cluster.jobs()), "the double has ended")
    assert started(tmp_path) == [0, 1, 2]


def test_launching_twice_attaches_to_the_run(stub_run: Make) -> None:
    run = stub_run("hold")
    run.submit()
    said = run.submit()
    assert "everything is submitted already" in said
    assert "expert-1" in said
    assert len(run.submissions()) == 3


def test_a_failed_expert_stops_nobody_and_assembly_names_it(stub_run: Make, tmp_path: Path, finished_run) -> None:
    run = stub_run("finish")
    (tmp_path / "stub" / "1").write_text("crash")
    run.submit()
    assert "expert-1: failed" in run.launcher("wait", code=1)
    rows = run.rows()
    assert [rows[f"expert-{index}"]["state"] for index in range(3)] == ["committed", "failed", "committed"]
    assert "crashed twice" in Path(rows["expert-1"]["log"]).read_text()
    assert "missing: 1" in run.launcher("logs", "assemble")
    assert len(run.events("expert-1", "started")) == 2, "one crash without progress may be bad luck"
    (tmp_path / "stub" / "1").write_text("finish")
    run.launcher("resume")
    newest = run.submissions()[-3:]
    assert [item["group"] for item in newest] == ["expert", "assemble", "evaluate"]
    assert newest[0]["indices"] == [1]
    wait_for_experts(run, [1])


def test_one_task_cancelled_by_hand_takes_the_chain_along_and_is_resumed_beside_the_living(
    stub_run: Make, tmp_path: Path
) -> None:
    run = stub_run("hold")
    run.submit()
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    array, assemble = run.job("expert"), run.job("assemble")
    said = run.launcher("cancel", "expert", "2")
    assert f"expert-2: cancelled {array}_2" in said
    assert "assemble, evaluate: cannot start without expert-2" in said
    wait_for(lambda: assemble not in run.cluster.jobs(), "the assembly, which would fail, is gone")
    wait_for(lambda: run.events("expert-2", "ended"), "expert-2 has ended")
    assert {name: row["state"] for name, row in run.rows().items() if row["stage"] == "expert"} == {
        "expert-0": "running", "expert-1": "running", "expert-2": "cancelled",
    }  # fmt: skip
    run.launcher("resume")
    assert [(item["group"], item["indices"]) for item in run.submissions()[3:]] == [
        ("expert", [2]), ("assemble", []), ("evaluate", []),
    ]  # fmt: skip
    assert run.submissions()[4]["after"] == [array, run.job("expert")]
    wait_for(lambda: started(tmp_path) == [0, 1, 2, 2], "expert-2 starts again, and no other")


def test_min_experts_lets_the_model_go_on_without_one(trained_run: Make, finished_run) -> None:
    run = trained_run(cluster={"min_experts": 2})
    for index in (0, 2):
        shutil.copytree(f"{finished_run.output_dir}/experts/expert-{index}", run.folder / f"experts/expert-{index}")
    partition = run.folder / "data" / "partitions" / "partition-1.tokens.bin"
    partition.write_bytes(b"broken")
    run.submit()
    said = run.launcher("wait")
    assert "expert-1: left out (cluster.min_experts)" in said
    assembled = open_artifact(str(run.folder / "assembled")).manifest
    assert sorted(assembled.inputs) == ["backbone", "expert-0", "expert-2"]
    assert assembled.facts["experts"] == 3, "the public FFN and two experts"
    assert "finished; nothing to do" in run.submit()


@pytest.mark.slow
def test_wanting_the_missing_expert_after_all_trains_it_and_assembles_again(trained_run: Make, finished_run) -> None:
    run = trained_run(cluster={"min_experts": 2})
    for folder in ("experts/expert-0", "experts/expert-1"):
        shutil.copytree(f"{finished_run.output_dir}/{folder}", run.folder / folder)
    run_command("modularforge", "assemble", "--config", str(run.config_file))
    run.values["cluster"]["min_experts"] = 3
    run.submit()
    assert run.submissions()[0]["indices"] == [2]
    run.launcher("wait")
    assert sorted(open_artifact(str(run.folder / "assembled")).manifest.inputs)[-1] == "expert-2"


def test_partitions_added_later_submit_only_the_new_experts(stub_run: Make, tmp_path: Path) -> None:
    from modularforge.provenance import commit, making

    run = stub_run("finish", count=2)
    run.submit()
    wait_for_experts(run, range(2))
    run.launcher("cancel")
    old = run.folder / "data"
    shutil.copytree(old, tmp_path / "more", ignore=shutil.ignore_patterns("partitions"))
    run.values |= {"data_dir": str(tmp_path / "more")}
    run.values["experts"]["count"] = 3
    plan = Run(run.config).plan("partition")
    with making(plan) as writer:
        for path in (old / "partitions").iterdir():
            if path.name != "manifest.json":
                shutil.copyfile(path, writer.folder / path.name)
                shutil.copyfile(path, writer.folder / path.name.replace("partition-0.", "partition-2."))
        commit(writer, plan, Run(run.config), {})
    run.submit()
    assert [item["indices"] for item in run.submissions() if item["group"] == "expert"] == [[0, 1], [2]]
    wait_for_experts(run, range(3))


def near_its_limit(stub_run: Make, **more: int) -> Launched:
    # Warned 40 s after its start: on a full machine a job that was warned after 20 had not begun to listen.
    limits = {"expert": {"cpus": 1, "time_minutes": 2}, "warning_seconds": 80, **more}
    run = stub_run("hold", cluster=limits)
    run.submit()
    return run


def test_a_job_near_its_time_limit_goes_back_to_the_queue(stub_run: Make) -> None:
    run = near_its_limit(stub_run)
    wait_for(lambda: run.events("expert-0", "requeued"), "expert-0 is requeued")
    assert [event["reason"] for event in run.events("expert-0", "requeued")] == ["time limit"]
    wait_for(lambda: len(run.events("expert-0", "started")) == 2, "expert-0 starts again")


@pytest.mark.slow
def test_a_job_that_always_reaches_its_time_limit_is_given_up(stub_run: Make) -> None:
    run = near_its_limit(stub_run, max_time_limits=1)
    wait_for(lambda: run.events("expert-0", "ended"), "expert-0 gives up", 300)
    assert run.events("expert-0", "ended")[0]["reason"] == "time limit"
    assert len(run.events("expert-0", "started")) == 2


def test_the_last_task_of_an_array_requeues_itself_alone(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.submit()
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    job = run.job("expert")
    for index in (0, 1):
        (tmp_path / "stub" / str(index)).write_text("finish")
        run.cluster.warn(f"{job}_{index}")
    wait_for_experts(run, [0, 1])
    # The last task has the id of the array: what Slurm says of the others must not be taken for its own state.
    wait_for(lambda: sorted(run.cluster.states(job)) == ["COMPLETED", "COMPLETED", "RUNNING"], "the others have ended")
    run.cluster.warn(f"{job}_2")
    wait_for(lambda: started(tmp_path).count(2) == 2, "the last one starts again")
    assert [started(tmp_path).count(index) for index in range(3)] == [2, 2, 2]
    assert len(experts_of(run)) == 1


@pytest.mark.parametrize("how", ["preempted without grace", "by a person"])
def test_a_job_that_slurm_sends_back_by_itself_is_not_submitted_twice(stub_run: Make, tmp_path: Path, how: str) -> None:
    run = stub_run("hold", cluster={"queue": "graceless"})
    run.submit()
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    if how == "by a person":
        run.cluster.run("scontrol", "requeue", f"{run.job('expert')}_2")
    else:
        run.cluster.preempt()
    wait_for(lambda: run.events("expert-2", "requeued"), "expert-2 notes that it goes back to the queue")
    (reason,) = (event["reason"] for event in run.events("expert-2", "requeued"))
    # On a busy machine a preempted job may be gone before it can say so; its next start notes that.
    assert reason == "sent back" or (reason == "by Slurm" and how != "by a person")
    # On its way back to the queue Slurm lists it as COMPLETING for a moment.
    assert run.rows()["expert-2"]["state"] in ("requeued", "running", "ending")
    assert "everything is submitted already" in run.submit()
    wait_for(lambda: started(tmp_path).count(2) == 2, "it starts again")
    assert len(run.events("expert-2", "requeued")) == 1, "once, not again at its start"
    assert len(run.submissions()) == 3


def test_a_failed_job_that_somebody_sends_back_is_not_submitted_twice(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    own = tmp_path / "stub" / "2"
    own.write_text("crash")
    run.submit()
    name = f"{run.job('expert')}_2"
    wait_for(lambda: run.events("expert-2", "ended"), "expert-2 has failed")
    wait_for(lambda: name not in run.cluster.jobs(), "its job has left the queue")
    own.write_text("finish")
    run.cluster.run("scontrol", "requeue", name)
    assert run.rows()["expert-2"]["state"] == "requeued"
    assert "everything is submitted already" in run.submit()
    wait_for_experts(run, [2])
    assert len(run.submissions()) == 3


def test_a_job_killed_without_a_word_is_found_and_resumed(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.submit()
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    for pid, line in run.cluster.job_processes().items():
        if "launcher.node expert" in line:
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not experts_of(run), "the jobs have ended")
    rows = run.rows()
    assert {rows[f"expert-{index}"]["state"] for index in range(3)} <= {"failed", "cancelled"}
    for index in range(3):
        (tmp_path / "stub" / str(index)).write_text("finish")
    run.launcher("resume")
    wait_for_experts(run, range(3))


def test_status_works_while_jobs_wait_run_and_are_requeued(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold", cluster={"array_throttle": 1})
    run.submit()
    wait_for(lambda: started(tmp_path) == [0], "expert-0 has started")
    rows = run.rows()
    assert rows["backbone"]["state"] == "committed"
    assert (rows["expert-0"]["state"], rows["expert-1"]["state"]) == ("running", "pending")
    assert rows["expert-1"]["reason"] == "JobArrayTaskLimit"
    assert rows["assemble"]["reason"] == "Dependency"
    assert rows["expert-0"]["nodes"].startswith("node")
    run.cluster.warn(f"{run.job('expert')}_0")
    wait_for(lambda: run.rows()["expert-0"]["state"] == "requeued", "expert-0 is back in the queue")
    assert run.rows()["expert-0"]["reason"] in ("BeginTime", "JobArrayTaskLimit", "Resources")


def test_status_watch_shows_what_changes_and_ends_with_the_run(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.submit()
    process = run.start("status", "--watch")
    assert process.stdout
    seen = next(line for line in process.stdout if line.startswith("expert-2 ") and " running " in line)
    assert "expert-2.log" in seen
    run.launcher("cancel")
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (*_, last) = (line for line in rest.splitlines() if line.startswith("expert-2 "))
    assert " cancelled " in last
    assert "goodput" in rest, "the end report follows"


def test_a_new_run_lies_beside_the_old_one_and_shares_its_data(stub_run: Make) -> None:
    run = stub_run("finish")
    run.submit()
    wait_for_experts(run, range(3))
    changed = ("--new-run", "--set", "experts.peak_learning_rate=0.5")
    said = run.submit(*changed)
    (folder,) = run.folder.parent.glob("run-*")
    assert f"at {folder}: 4 submission(s)" in said
    other = Launched(run.cluster, {**run.values, "output_dir": str(folder)})
    assert [item["group"] for item in other.submissions()] == ["backbone", "expert", "assemble", "evaluate"]
    assert "everything is submitted already" in run.submit(*changed)
    wait_for_experts(other, range(3))
    assert other.rows()["prepare-data"]["state"] == "committed"
    assert not (folder / "data").exists()
    assert len(run.submissions()) == 3, "nothing was added to the old one"


def test_wait_outlasts_a_slurm_that_does_not_answer(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.submit()
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    (tools / "squeue").write_text(
        f"#!/bin/bash\nif [ -e {asked} ]; then\n"
        f'echo x >> {asked}; echo "Unable to contact slurm controller" >&2; exit 1; fi\n'
        'exec "$(PATH=${PATH#*:} type -P squeue)" "$@"\n'
    )
    (tools / "squeue").chmod(0o755)
    run.environment = {"PATH": f"{tools}:{run.cluster.environ['PATH']}"}
    process = run.start("wait")
    assert process.stdout
    assert next(process.stdout).startswith("prepare-data: committed")
    asked.touch()
    wait_for(lambda: asked.read_text().count("x") >= 2, "Slurm was asked twice in vain")
    asked.unlink()
    run.environment = {}
    run.launcher("cancel")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "expert-2: cancelled" in output
    assert "Unable to contact slurm controller; it is asked again" in errors


def test_logs_follow_a_job_to_its_end(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.submit()
    process = run.start("logs", "expert/2", "--follow")
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    run.launcher("cancel")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "the stand-in of expert 2 starts" in output
    assert "Slurm is ending this job" in output


def test_the_preflight_reports_every_problem_and_submits_nothing(stub_run: Make, tmp_path: Path) -> None:
    broken = {"expert": {"nodes": 9}, "other": {"time_minutes": 5000}, "python": "/no/python", "container": None}
    run = stub_run("finish", cluster=broken)
    said = run.launcher("--cluster", code=2)
    assert "expert must be accepted by sbatch" in said
    assert "cluster.expert.nodes is 9, but there are 4 in the queue (main): lower it" in said
    assert "cluster.other.time_minutes must be at most the queue's 1440, but is 5000" in said
    assert "/no/python" in said
    run.values["cluster"]["queue"] = "main,nowhere"
    said = run.launcher("--cluster", code=2)
    assert "cluster.queue must be one of main, preemptible, graceless, but is nowhere" in said
    assert not run.cluster.jobs()
    assert not (run.folder / "cluster" / "run.json").exists()


def test_each_expert_gets_a_gpu_of_its_own(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold", cluster={"expert": {"gpus": 1, "cpus": 1}})
    run.submit()
    wait_for(lambda: started(tmp_path) == [0, 1, 2], "all have started")
    lines = run.cluster.job_processes().items()
    stubs = [pid for pid, line in lines if "stub.py" in line and "srun" not in line]
    environments = [Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in stubs]
    names = ("CUDA_VISIBLE_DEVICES=", "SLURMD_NODENAME=")
    places = [{item for item in found if item.startswith(names)} for found in environments]
    assert all(len(place) == 2 for place in places)
    assert len({frozenset(place) for place in places}) == 3
    assert run.events("expert-0", "started")[0]["gpus"] == 1


def test_jobs_get_a_built_environment(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("hold")
    run.environment = {
        "AWS_ACCESS_KEY_ID": "key", "PRIVATE_TOKEN": "secret", "SLURM_NTASKS": "7", "RANK": "3", "SBATCH_QOS": "no",
    }  # fmt: skip
    run.submit()
    wait_for(lambda: started(tmp_path), "an expert has started")
    pid = next(pid for pid, line in run.cluster.job_processes().items() if "stub.py" in line and "srun" not in line)
    names = dict(item.partition("=")[::2] for item in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    assert names["AWS_ACCESS_KEY_ID"] == "key"
    assert names["SLURM_NTASKS"] == "1"
    assert not {"PRIVATE_TOKEN", "RANK", "SBATCH_QOS"} & set(names)
    assert "secret" not in json.dumps(run.submissions())


@pytest.mark.slow
def test_two_hundred_experts_with_a_throttle(stub_run: Make, tmp_path: Path) -> None:
    run = stub_run("finish", 200, cluster={"array_throttle": 8})
    run.submit()
    most = 0

    def all_done() -> bool:
        nonlocal most
        running = run.cluster.run("squeue", "-h", "-r", "-t", "R", "-o", "%j").split()
        most = max(most, sum(name.startswith("expert-") for name in running))
        return all(run.has(f"experts/expert-{index}") for index in range(200))

    wait_for(all_done, "200 experts", 280)
    assert most <= 8
    assert started(tmp_path) == list(range(200))


def test_logs_of_a_run_in_a_folder_with_percent_signs_and_quotes_are_where_status_says(
    stub_run: Make, tmp_path: Path
) -> None:
    run = stub_run("finish", name="100 %j%a it's, a=run")
    run.submit()
    wait_for_experts(run, range(3))
    for index in range(3):
        assert "the stand-in of expert" in Path(run.rows()[f"expert-{index}"]["log"]).read_text()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {run.folder.name, "stub"}
    assert shown_command("python", "-m", "launcher", "resume", "--output-dir", str(run.folder)) in run.launcher(
        "cancel"
    )
