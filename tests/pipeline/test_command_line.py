"""The commands as a user types them: what they print, where they write, and how they answer mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml

from checkpoints import paths
from modularforge.config import Config
from modularforge.config_files import to_yaml
from modularforge.exits import run_app
from tests.conftest import ROOT, run_command, tiny_config, tiny_values

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def write_settings(folder: Path, values: dict[str, object]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def mistake(*arguments: str, cwd: Path | None = None) -> str:
    """Standard error of a command that must end with code 2 and no traceback."""
    done = run_command("modularforge", *arguments, check=False, env=WIDE)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def copied_run(finished_run: Config, tmp_path: Path) -> tuple[Config, str]:
    """A copy of the finished run that a test may damage, and its settings file."""
    config = tiny_config(tmp_path / "run")
    shutil.copytree(paths.local_path(finished_run.output_dir), tmp_path / "run")
    return config, write_settings(tmp_path, yaml.safe_load(to_yaml(config)))


@pytest.mark.parametrize("verb", ["prepare-data", "train", "assemble", "evaluate", "generate", "run-all", "info"])
def test_every_command_explains_itself_and_takes_the_shared_options(verb: str) -> None:
    shown = run_command("modularforge", verb, "--help", env=WIDE).stdout
    for option in ("--config", "--smoke-test", "--data-dir", "--output-dir", "--set", "--help"):
        assert option in shown


def test_help_comes_fast_and_without_torch() -> None:
    fastest = 1e9
    for _ in range(3):
        start = time.perf_counter()
        run_command("modularforge", "--help", forked=False)
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 3.0  # far above the promise (benchmarks/startup.py), far below an import of torch and sklearn


def test_a_second_run_does_nothing_again(copied_run: tuple[Config, str]) -> None:
    config, path = copied_run
    folder = paths.local_path(config.output_dir)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    done = run_command("modularforge", "run-all", "--config", path)
    assert done.stderr.count("is finished") >= 7
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
    assert "assembled" in done.stdout
    assert f"model:   {config.output_dir}/calibrated" in done.stdout


def test_evaluate_one_model_folder_writes_nothing(copied_run: tuple[Config, str]) -> None:
    config, path = copied_run
    shutil.rmtree(paths.local_path(config.output_dir) / "evaluation")
    model = f"{config.output_dir}/assembled"
    done = run_command("modularforge", "evaluate", "--config", path, "--model", model)
    assert "mean loss" in done.stdout
    assert not (paths.local_path(config.output_dir) / "evaluation").exists()


def test_generate_continues_a_prompt_and_talks_until_an_empty_line(finished_run: Config) -> None:
    model = f"{finished_run.output_dir}/assembled"
    command = ["modularforge", "generate", "--config", "configs/quickstart.yaml", "--model", model, "--tokens", "5"]
    once = run_command(*command, "--prompt", "The law")
    assert once.stdout.startswith("The law")
    again = run_command(*command, "--prompt", "The law")
    assert once.stdout == again.stdout
    talked = run_command(*command, input="The law\nA second\n\nnever read\n")
    assert "The law" in talked.stdout
    assert "A second" in talked.stdout
    assert "never read" not in talked.stdout


def test_results_are_valid_json_with_every_model_and_a_report(finished_run: Config) -> None:
    folder = paths.local_path(finished_run.output_dir) / "evaluation"
    results = json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    names = ["backbone", "dense", "expert-0", "expert-1", "expert-2", "oracle", "soup", "assembled", "calibrated"]
    assert list(results["models"]) == names
    for model in results["models"].values():
        assert model["mean_loss"] == pytest.approx(sum(d["loss"] for d in model["domains"].values()) / 3)
    routing = results["routing"]["assembled"]
    for rows in (routing["share_per_layer_and_expert"], list(routing["share_per_domain_and_expert"].values())):
        assert all(sum(row) == pytest.approx(1, abs=1e-4) and len(row) == 4 for row in rows)
    report = (folder / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names)


def test_a_missing_stage_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    path = write_settings(tmp_path, tiny_values(tmp_path / "run"))
    assert "run `modularforge prepare-data`" in mistake("train", "--only", "backbone", "--config", path)
    run_command("modularforge", "prepare-data", "--config", path)
    assert "run `modularforge backbone`" in mistake("train", "--only", "expert", "--index", "1", "-c", path)
    assert "run `modularforge backbone`" in mistake("assemble", "--config", path)


def test_an_artifact_of_another_config_is_refused_and_kept(copied_run: tuple[Config, str]) -> None:
    config, path = copied_run
    manifest = paths.local_path(config.output_dir) / "backbone" / "manifest.json"
    before = manifest.read_bytes()
    text = mistake("train", "--only", "backbone", "--config", path, "--set", "backbone.steps=21")
    assert "backbone.steps is 21 here and 20 there" in text
    assert "another --output-dir" in text
    assert manifest.read_bytes() == before
    text = mistake("assemble", "--config", path, "--set", "model.ffn_width=96")
    assert "model.ffn_width is 96 here and 88 there" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run-all", "--config", "nowhere.yaml"], "error: nowhere.yaml must be a YAML file, but does not exist"),
        (["run-all", "--config", "configs/smal.yaml"], "but does not exist; there is configs/small.yaml, "),
        (["run-all", "--config", "configs"], "error: configs must be a YAML file, but cannot read configs"),
        (["study", "nowhere.yaml"], "error: nowhere.yaml must be a YAML file, but does not exist"),
        (
            ["train", "--only", "experts"],
            "--only must be one of backbone, expert, dense, dense_wide, joint, joint_evidence, joint_lora, "
            "joint_lora_wide, branch, btx, but is",
        ),
        (["train", "--only", "expert"], "--only expert and --index K go together"),
        (["train", "--index", "1"], "--only expert and --index K go together"),
        (["train", "--only", "backbone", "--skip-backbone"], "exclude each other"),
        (["train", "--set", "backbone.stps=1"], "did you mean backbone.steps?"),
        (["generate", "--model", "no/such/folder", "--prompt", "x"], "no/such/folder"),
        (["generate", "--model", "configs", "--prompt", "x"], "has no config.json"),
        (["evaluate", "--wrong-flag"], "No such option"),
        (["assemble", "-o", "nosuchprotocol://x/y"], "nosuchprotocol"),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_two(arguments: list[str], message: str) -> None:
    assert message in mistake(*arguments)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", b"", "empty"),
        ("broken.jsonl", b'{"text": "x"\n', "broken.jsonl:1"),
        ("column.jsonl", b'{"body": "x"}\n', "body"),
        ("binary.txt", b"good text\n\xff\xfe\x00", "binary.txt"),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00garbage", "cut.txt.gz"),
    ],
)
def test_a_bad_corpus_is_named(source: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / source).write_bytes(content)
    values = tiny_values(tmp_path / "run", partition={"method": "random"})
    values["data"]["sources"] = [{"name": "mine", "train": str(tmp_path / source)}]
    text = mistake("prepare-data", "--config", write_settings(tmp_path, values))
    assert message in text
    assert not (tmp_path / "run" / "data" / "manifest.json").exists()


def test_a_place_that_is_taken_is_refused_before_the_work(finished_run: Config, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", data_dir=finished_run.data_url)
    (tmp_path / "run" / "backbone").mkdir(parents=True)
    (tmp_path / "run" / "backbone" / "notes.txt").write_text("mine")
    path = write_settings(tmp_path, yaml.safe_load(to_yaml(config)))
    assert "must be free or a committed artifact" in mistake("train", "--only", "backbone", "--config", path)
    assert not (tmp_path / "run" / "metrics").exists()


def test_other_text_under_the_same_settings_is_another_corpus(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    values = tiny_values(tmp_path / "run", partition={"method": "random"}, experts={"count": 1})
    values["data"]["sources"] = [{"name": "mine", "train": str(source)}]
    path = write_settings(tmp_path, values)
    for alphabet in ("abcdefghij", "αβγδεζηθικ"):
        words = [" ".join(alphabet[(i * j) % 10] * 4 for j in range(1, 60)) + f" {i}" for i in range(300)]
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
        shutil.rmtree(tmp_path / "run" / "data", ignore_errors=True)
        run_command("modularforge", "prepare-data", "--config", path)
        if alphabet[0] == "a":
            run_command("modularforge", "train", "--only", "backbone", "--config", path)
    assert "it was made from another corpus" in mistake("train", "--only", "backbone", "--config", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "backbone.peak_learning_rate=.inf"], "backbone.peak_learning_rate must be a finite number"),
        (["--set", "data.sources=[]"], "data.sources must be a list of at least 1 entries"),
        (["--set", "model=5"], "model must be a section"),
        (["--set", "data.sources=[{name: a b, train: x}]"], "letters, digits, dots, dashes"),
        (["--set", "data.sources=[{name: x}]"], "data.sources.0.train must be set"),
        (["--output-dir", ""], "output_dir must be a text of at least 1 characters"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_plain_words(arguments: list[str], message: str) -> None:
    assert message in mistake("info", "--config", "configs/quickstart.yaml", *arguments)


def test_generate_needs_no_settings_when_the_model_is_named(finished_run: Config, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modularforge", "generate", "--model", f"{finished_run.output_dir}/assembled"]
    command += ["--tokens", "4", "--prompt", "The", "--temperature", "1e-300"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = subprocess.run([*command[:-4], "--prompt", b"\xff\xfe"], cwd=tmp_path, capture_output=True, text=True)
    assert broken.returncode == 2
    assert "must be valid Unicode" in broken.stderr


def test_a_run_on_s3_without_credentials_is_one_sentence(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "run", partition={"method": "random"})
    values["data"]["sources"] = [{"name": "mine", "train": "s3://some-bucket/x.jsonl"}]
    path = write_settings(tmp_path, values)
    nothing = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "none", "AWS_CONFIG_FILE": "none"}
    done = run_command("modularforge", "prepare-data", "--config", path, check=False, env=nothing)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "credentials" in done.stderr


def test_ctrl_c_is_one_sentence_and_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["modularforge"])
    with pytest.raises(SystemExit) as end:
        run_app(app)
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines() == [
        "interrupted; what was committed is kept, and the same command continues"
    ]


def test_debug_shows_where_an_error_was_raised() -> None:
    done = run_command("modularforge", "info", "--config", "nowhere.yaml", "--debug", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_output_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    path = write_settings(tmp_path, tiny_values(tmp_path / "file" / "run"))
    assert "file" in mistake("prepare-data", "--config", path)


def test_info_counts_what_the_default_config_builds() -> None:
    shown = run_command("modularforge", "info").stdout
    assert "20,992,512 parameters" in shown
    assert "66,080,784 parameters, 31,410,192 active" in shown
    assert str(ROOT) not in shown
