"""A stage is its module, its row and its test: commands, jobs, identity and evaluation follow from the row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from checkpoints import Artifact, find_artifact
from launcher.tasks import build_groups, build_tasks, is_finished, nodes_of
from modularforge import cli, settings_page
from modularforge.config import Config
from modularforge.config_files import make_config, to_yaml
from modularforge.errors import ConfigError, MismatchError
from modularforge.pipeline import STAGES, JobName, Stage, job_named, stage_settings, wanted_stages
from modularforge.provenance import commit, making
from modularforge.run import Run
from tests.conftest import tiny_values

ROW = Stage(
    "parrot",
    "baselines/parrot",
    ("experts", "training"),
    ("backbone",),
    "tests.pipeline.test_stages:repeat_backbone",
    phase=lambda config: config.experts,
    nodes="expert",
    panel="baselines",
)


def repeat_backbone(run: Run) -> Artifact:
    """The module of a stage: the backbone again, under another name."""
    plan = run.plan("parrot")
    if found := run.finished(plan):
        return found
    with making(plan) as writer:
        for name in run.require("backbone").manifest.files:
            shutil.copyfile(run.require("backbone").local_file(name), writer.folder / name)
        return commit(writer, plan, run, {"validation_loss": 1.0})


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, finished_run: Config, tmp_path: Path) -> Config:
    """A finished run whose table of stages has learned another row."""
    rows = {**STAGES, "parrot": ROW}
    ordered = {name: rows[name] for name in sorted(rows, key=lambda name: (name == "evaluate",))}
    monkeypatch.setattr("modularforge.pipeline.STAGES", ordered)
    for place in ("modularforge.run", "modularforge.cli", "modularforge.stages.evaluate", "launcher.tasks"):
        monkeypatch.setattr(f"{place}.STAGES", ordered)
    shutil.copytree(finished_run.output_dir, tmp_path / "run")
    return finished_run.model_copy(update={"output_dir": str(tmp_path / "run")})


def test_a_new_row_is_a_job_of_the_launcher(config: Config) -> None:
    tasks = build_tasks(config)
    groups = {group.name: group for group in build_groups(tasks)}
    assert groups["parrot"].after == ("backbone",)
    assert "parrot" in groups["evaluate"].after
    assert nodes_of(config, "parrot") == config.cluster.expert
    task = next(task for task in tasks if task.name == "parrot")
    assert (task.arguments, task.is_training, task.is_worker) == (("parrot",), True, True)
    assert not is_finished(Run(config), task)


def test_a_new_row_is_a_command_and_a_row_of_the_evaluation(config: Config, tmp_path: Path) -> None:
    app = typer.Typer()
    cli.add_jobs(app, [ROW, STAGES["backbone"]])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    done = CliRunner().invoke(app, ["parrot", "--config", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert find_artifact(f"{config.output_dir}/baselines/parrot") is not None
    models: dict[str, Any] = Run(config).make("evaluate")["models"]
    assert models["parrot"]["mean_loss"] == models["backbone"]["mean_loss"]


def test_a_new_row_is_made_anew_when_a_setting_of_its_sections_changes(config: Config) -> None:
    Run(config).make("parrot")
    faster = config.experts.model_copy(update={"peak_learning_rate": 0.5})
    with pytest.raises(MismatchError, match=r"peak_learning_rate is 0\.5 here"):
        Run(config.model_copy(update={"experts": faster})).make("parrot")
    said_more = config.training.model_copy(update={"log_every": 1})
    assert Run(config.model_copy(update={"training": said_more})).artifact("parrot") is not None


@pytest.mark.parametrize("name", STAGES)
def test_every_row_names_a_function_and_sections_that_there_are(name: str, tmp_path: Path) -> None:
    stage = STAGES[name]
    assert callable(stage.function())
    values = yaml.safe_load(to_yaml(Config.model_validate(tiny_values(tmp_path))))
    assert all(section in values for section in stage.sections)
    assert all(setting.split(".")[0] in values for setting in stage.also)
    assert stage_settings(Config.model_validate(tiny_values(tmp_path)), name)


@pytest.mark.parametrize("text", ["backbone", "expert-3", "branch-12", "assemble"])
def test_a_jobs_name_is_read_back(text: str) -> None:
    assert str(JobName.parse(text)) == text
    assert JobName.parse("expert/3") == JobName("expert", 3)


def test_manifests_say_what_they_always_said(finished_run: Config) -> None:
    run = Run(finished_run)
    kinds = {name: (found := find_artifact(run.url(name))) and found.manifest.kind for name in OF_A_RUN}
    assert kinds == OF_A_RUN
    assembled = run.require("assemble").manifest
    assert set(run.require("calibrate").manifest.inputs) == {"corpus", "assembled"}
    assert set(assembled.inputs) == {"backbone", "expert-0", "expert-1", "expert-2"}
    assert set(run.require("dense").manifest.inputs) == {"corpus", "partitions", "backbone"}
    assert set(run.require("expert", 1).manifest.inputs) == {"backbone", "partition"}


OF_A_RUN = {
    "prepare-data": "corpus", "partition": "partitions", "backbone": "backbone", "dense": "dense",
    "assemble": "assembled", "calibrate": "calibrated", "evaluate": "evaluation",
}  # fmt: skip


def test_another_name_of_a_stage_is_refused_with_the_right_one(finished_run: Config) -> None:
    for name, cure in (("assembled", "write 'assemble'"), ("backbones", "choose one of these")):
        with pytest.raises(ConfigError, match=rf"a stage must be one of .*, but is '{name}'; {cure}"):
            Run(finished_run).require(name)


@pytest.mark.parametrize("word", ["assemble", "assembled", "calibrated", "calibrate", "calibration"])
def test_a_job_is_found_by_its_own_word_and_by_those_of_what_it_makes(word: str) -> None:
    assert job_named(word) == JobName("assemble")
    assert (job_named("evaluation"), job_named("corpus")) == (JobName("evaluate"), JobName("prepare-data"))
    assert (job_named("expert/3"), job_named("branch-0")) == (JobName("expert", 3), JobName("branch", 0))
    assert job_named("nothing") == JobName("nothing")


def test_run_all_makes_and_measures_a_new_row(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    done = CliRunner().invoke(cli.app, ["run-all", "--config", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Run(config).artifact("parrot") is not None
    assert "parrot" in Run(config).make("evaluate")["models"]


def test_a_baseline_is_its_file_and_its_row(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `evaluation.baselines` may name, in settings, their page and their schema, follows from the rows."""
    rows = {**STAGES, "parrot": dataclasses.replace(ROW, baseline="parrot")}
    monkeypatch.setattr("modularforge.pipeline.STAGES", rows)
    named = make_config(tiny_values(tmp_path, evaluation={"baselines": ["parrot", "soup"]}), "tests")
    assert "parrot" in [stage.name for stage in wanted_stages(named)]
    assert "parrot" not in [stage.name for stage in wanted_stages(config)]
    wrong = r"evaluation\.baselines\.0 must be 'dense', .*'parrot' or 'soup', but is 'parott'; change it"
    with pytest.raises(ConfigError, match=wrong):
        make_config(tiny_values(tmp_path, evaluation={"baselines": ["parott"]}), "tests")
    assert "parrot | soup" in settings_page.page("evaluation.baselines", as_markdown=False)
    schema = json.loads(settings_page.schema())
    assert "parrot" in schema["$defs"]["EvaluationConfig"]["properties"]["baselines"]["items"]["enum"]
