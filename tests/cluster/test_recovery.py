"""Preemption, dead nodes, scancel and hand-made jobs with real training: nothing is lost, doubled or left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import open_artifact
from modularforge.config import Config
from modularforge.run import Run
from tests.cluster.conftest import Launched
from tests.cluster.slurm import wait_for
from tests.conftest import ROOT

Make = Callable[..., Launched]
# Long enough to be caught in the middle; on a checkpoint boundary nothing happens by chance.
LONG = {"steps": 700, "warmup_steps": 2}
TRAINING = {"log_every": 20, "validate_every": 2000, "checkpoint_every": 10_000}


def uninterrupted(run: Launched, stage: str, tmp_path: Path) -> Launched:
    """The same training here, in one piece."""
    from modularforge.stages import backbone, expert

    other = Launched(run.cluster, {**run.values, "output_dir": str(tmp_path / "uninterrupted")})
    for folder in ("data", "backbone"):
        if (run.folder / folder).exists() and folder != stage:
            shutil.copytree(run.folder / folder, other.folder / folder)
    if stage == "backbone":
        backbone.run(Run(other.config))
    else:
        expert.run(Run(other.config), 0)
    return other


def test_a_preempted_expert_goes_on_with_equal_losses(trained_run: Make, tmp_path: Path) -> None:
    run = trained_run(experts=LONG, training=TRAINING, cluster={"queue": "preemptible", "array_throttle": 1})
    run.submit()
    run.wait_for_step("expert-0", 40)
    run.cluster.preempt()
    wait_for(lambda: run.events("expert-0", "requeued"), "expert-0 is requeued")
    assert run.rows()["expert-0"]["state"] in ("requeued", "running")
    run.cluster.run("scancel", f"{run.job('expert')}_[1-2]")  # else it waits until these have trained
    run.wait_for_artifact("experts/expert-0", 300)
    requeued = run.events("expert-0", "requeued")
    assert [event["reason"] for event in requeued] == ["preempted"]
    assert run.events("expert-0", "started")[1]["step"] == requeued[0]["step"] >= 40
    assert not run.events("expert-1", "requeued"), "only the preempted task of the array goes back"
    other = uninterrupted(run, "expert", tmp_path)
    # Means between two reports: the one at the stop is cut short, so the lines on common steps after it are compared.
    later = [(step, loss) for step, loss in other.losses("expert-0") if step > requeued[0]["step"] + 20]
    assert later
    assert set(later) <= set(run.losses("expert-0"))
    weights = [open_artifact(str(one.folder / "experts/expert-0")).manifest.files for one in (run, other)]
    assert weights[0]["expert.safetensors"] == weights[1]["expert.safetensors"]


def test_a_preempted_backbone_on_two_nodes_goes_on_and_its_chain_with_it(
    new_run: Make, finished_run: Config, tmp_path: Path
) -> None:
    run = new_run(backbone=LONG, training=TRAINING, cluster={"queue": "preemptible"})
    shutil.copytree(Path(finished_run.output_dir) / "data", run.folder / "data")
    run.submit()
    run.wait_for_step("backbone", 20, 180)
    run.cluster.preempt()
    run.wait_for_artifact("backbone", 300)
    requeued = run.events("backbone", "requeued")
    assert [event["reason"] for event in requeued] == ["preempted"]
    assert run.events("backbone", "started")[1]["step"] == requeued[0]["step"] >= 20
    wait_for(lambda: run.events("expert-0", "started"), "the experts follow", 120)
    other = uninterrupted(run, "backbone", tmp_path)
    # As above: the stop cuts one mean short, and where it fell no two machines agree.
    later = {step: loss for step, loss in other.losses("backbone") if step > requeued[0]["step"] + 20}
    mine = {step: loss for step, loss in run.losses("backbone") if step in later}
    assert later
    assert mine == pytest.approx(later, abs=2e-4), "two ranks equal one up to rounding"


@pytest.mark.slow
def test_a_node_dies_and_its_job_goes_on_elsewhere(trained_run: Make) -> None:
    run = trained_run(experts=LONG, training={**TRAINING, "checkpoint_every": 50}, cluster={"array_throttle": 1})
    run.submit()
    run.wait_for_step("expert-0", 60)
    node = run.events("expert-0", "started")[0]["nodes"]
    run.cluster.crash(node)
    try:
        wait_for(lambda: len(run.events("expert-0", "started")) == 2, "expert-0 starts again", 120)
    finally:
        run.cluster.start_node(node)
    second = run.events("expert-0", "started")[1]
    assert second["nodes"] != node
    assert second["step"] >= 50
    assert [event["reason"] for event in run.events("expert-0", "requeued")] == ["by Slurm"]
    run.wait_for_artifact("experts/expert-0")
    wait_for(lambda: run.cluster.state_of(node) in ("idle", "mixed", "allocated"), f"{node} is back")


def test_scancel_ends_torchrun_within_seconds_and_leaves_a_checkpoint(new_run: Make, finished_run: Config) -> None:
    run = new_run(backbone={"steps": 3000}, training=TRAINING)
    shutil.copytree(Path(finished_run.output_dir) / "data", run.folder / "data")
    run.submit()
    run.wait_for_step("backbone", 20)
    assert any("modularforge" in line for line in run.cluster.job_processes().values())
    run.cluster.run("scancel", run.job("backbone"))
    wait_for(lambda: not run.cluster.job_processes(), "all processes of the job have ended", 12)
    assert run.events("backbone")[-1]["reason"] == "cancelled"
    assert run.rows()["backbone"]["checkpoint_step"] >= 20
    wait_for(lambda: not run.cluster.jobs(), "what waited for the backbone is gone as well")
    rows = run.rows()
    assert {rows[name]["state"] for name in ("backbone", "expert-0", "expert-2", "evaluate")} == {"cancelled"}
    run.launcher("resume")
    wait_for(lambda: len(run.events("backbone", "started")) == 2, "the backbone starts again")
    assert run.events("backbone", "started")[1]["step"] >= 20


def test_cancel_ends_the_run_and_resume_continues_it(trained_run: Make) -> None:
    run = trained_run(experts={**LONG, "steps": 5000}, training=TRAINING)
    run.submit()
    run.wait_for_step("expert-0", 40)
    said = run.launcher("cancel")
    assert said.index("evaluate: cancelled") < said.index("assemble: cancelled") < said.index("expert: cancelled")
    assert not run.cluster.jobs()
    assert not run.cluster.job_processes()
    run.launcher("resume")
    assert [item["group"] for item in run.submissions()][3:] == ["expert", "assemble", "evaluate"]
    wait_for(lambda: len(run.events("expert-0", "started")) == 2, "expert-0 starts again")
    assert run.events("expert-0", "started")[1]["step"] >= 40


def test_sbatch_by_hand_gives_the_same_experts(trained_run: Make, finished_run: Config) -> None:
    run = trained_run()
    environment = {
        **run.cluster.environ, "CONFIG": str(run.config_file), "OUTPUT_DIR": str(run.folder),
        "VIRTUAL_ENV": str(Path(sys.prefix)), "RANK": "7", "SLURM_JOB_ID": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", "--mem=0", f"--output={run.folder}/%a.log",
         "slurm/train_experts.sh"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for index in range(2):
        run.wait_for_artifact(f"experts/expert-{index}")
        mine, theirs = (
            open_artifact(f"{folder}/experts/expert-{index}").manifest
            for folder in (run.folder, finished_run.output_dir)
        )
        assert mine.fingerprint == theirs.fingerprint
        assert mine.files["expert.safetensors"] == theirs.files["expert.safetensors"]
    assert [event["event"] for event in run.events("expert-1")][:1] == ["started"]
