"""Settings that try to become lines of sbatch scripts, commands, other folders, or words in somebody's log."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from checkpoints.screen import say, shown_command
from launcher import slurm
from launcher.allocation import Allocation
from launcher.arrays import cut
from launcher.command import training_command
from launcher.layout import folder_name, log_file, log_pattern, work_folder
from launcher.plan import describe_plan
from launcher.preflight import _python
from launcher.processes import LocalLauncher
from launcher.record import Submission, new_record
from launcher.runs import launch
from launcher.sbatch import Request, script_of
from launcher.status import read_status
from launcher.tasks import build_tasks
from launcher.trust import check_commands
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.errors import ConfigError
from modularforge.exits import run_app
from modularforge.run import Run
from tests.conftest import tiny_config, tiny_values

CANARY = "canary"
PAYLOADS = [
    f"\ntouch {CANARY}\n",
    f"x\ntouch {CANARY} #",
    f"x\r\ntouch {CANARY}",
    f"x\x0btouch {CANARY}",
    f"x\x85touch {CANARY}",
    f"x\u2028touch {CANARY}",
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"x; touch {CANARY}",
    f"x & touch {CANARY} &",
    f"x | touch {CANARY}",
    f"'; touch {CANARY}; '",
    f'"; touch {CANARY}; "',
    f"'$(touch {CANARY})'",
    f"x' \"$(touch {CANARY})",
    f"${{x:=$(touch {CANARY})}}",
    f"x > {CANARY}",
    f"x #\\\ntouch {CANARY}",
    "x\\",
    "x\\\\",
    "x\x00y",
    "x\x1b[2J",
    "a %j b",
    "100%",
    "%%j",
    "--wrap=x",
    "a,b=c",
    "a b",
    " ",
    "#SBATCH --wrap=x",
    "\n#SBATCH --wrap=x\n",
    "${HOME}",
    "~root",
    "!!",
    "*",
    "é ü",
]


def with_setting(place: str, value: str, tmp_path: Path) -> dict[str, Any]:
    values = tiny_values(tmp_path / "run")
    cluster = values.setdefault("cluster", {})
    if place == "output_dir":
        values["output_dir"] = f"{tmp_path}/{value}"
    elif place in ("name", "data_dir"):
        values[place] = value
    elif place == "source":
        values["data"]["sources"][0]["train"] = value
    elif place == "option":
        cluster["sbatch_options"] = {"reservation": value}
    elif place == "option_name":
        cluster["sbatch_options"] = {value: "x"}
    elif place == "pass_environment":
        cluster[place] = [value]
    elif place == "remote":
        values["output_dir"] = f"s3://bucket/{value}"
    else:
        cluster[place] = value
    return values


PLACES = [
    "output_dir",
    "remote",
    "name",
    "data_dir",
    "source",
    "option",
    "option_name",
    "pass_environment",
    "queue",
    "account",
    "qos",
    "constraint",
    "work_dir",
    "python",
    "container",
]
OURS = re.compile(
    r"#!/bin/bash|# Parameters|#SBATCH --[A-Za-z][A-Za-z0-9-]*(=.*)?|# command|export SUBMITIT_EXECUTOR=slurm|exec .*|"
)


def script(values: dict[str, Any], tmp_path: Path) -> str:
    config = make_config(values, "here")
    return script_of(config, Request("expert", "key", "0123456789abcdef", tmp_path, cut([0, 1], 1001, 2)[0], ("7",)))


@pytest.mark.parametrize("place", PLACES)
def test_no_setting_becomes_a_line_of_a_script_or_a_command(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = script(tiny_values(tmp_path / "run"), tmp_path).splitlines()
    accepted = 0
    for payload in PAYLOADS:
        try:
            text = script(with_setting(place, payload, tmp_path), tmp_path)
        except ConfigError:
            continue
        accepted += 1
        lines = text.splitlines()
        assert all(OURS.fullmatch(line) for line in lines), text
        assert len(lines) <= len(usual) + 1, "an option more at the most"
        (tmp_path / "script.sh").write_text(text)
        subprocess.run(["bash", "-n", "script.sh"], check=True)
        subprocess.run(["bash", "script.sh"], capture_output=True, env={"PATH": os.environ["PATH"], "PYTHON": "x"})
        assert not (tmp_path / CANARY).exists(), payload
    assert accepted >= (0 if place == "option_name" else 8)


def test_there_are_enough_hostile_settings() -> None:
    assert len(PLACES) * len(PAYLOADS) >= 240


def test_lines_of_the_setup_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.setup\.0 must be one line without control characters"):
        tiny_config(tmp_path, cluster={"setup": ["module load x\nrm -r y"]})


def test_a_container_is_words_and_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, cluster={"container": f"apptainer exec 'my image.sif'; touch {CANARY}"})
    allocation = Allocation("1", "1", None, 0, 1, "node1", 1, 0, 1)
    command = training_command(config, build_tasks(config)[1], allocation, [])
    assert command[command.index("apptainer") : command.index("python3")] == [
        "apptainer", "exec", "my image.sif;", "touch", CANARY,
    ]  # fmt: skip
    subprocess.run(["bash", "-c", f"{_python(config)} -c pass"], capture_output=True)
    assert not (tmp_path / CANARY).exists()
    with pytest.raises(ConfigError, match=r"cluster\.container must be words of a shell with paired quotes"):
        tiny_config(tmp_path, cluster={"container": "apptainer 'exec"})


@pytest.mark.parametrize("name", ["array", "comment", "dependency", "job-name", "job_name", "output"])
def test_options_by_which_the_launcher_finds_jobs_are_its_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be an option that the launcher does not set itself"):
        tiny_config(tmp_path, cluster={"sbatch_options": {name: "x"}})


def test_options_that_are_false_are_left_out_and_empty_texts_are_the_sites_default(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "run", cluster={"queue": "", "sbatch_options": {"requeue": False}})
    lines = script(values, tmp_path).splitlines()
    assert not any("requeue" in line or "partition" in line for line in lines)


def test_options_take_the_place_of_the_launchers_however_they_are_spelt(tmp_path: Path) -> None:
    options = {"exclusive": True, "cpus-per-task": 9, "kill_on_invalid_dep": "no", "open_mode": "truncate", "nodes": 3}
    lines = script(tiny_values(tmp_path / "run", cluster={"sbatch_options": options}), tmp_path).splitlines()
    names = [line.partition("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert len(set(names)) == len(names)
    for line in ("exclusive", "cpus-per-task=9", "kill-on-invalid-dep=no", "open-mode=truncate", "nodes=3"):
        assert f"#SBATCH --{line}" in lines


def test_a_working_folder_with_a_line_break_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a\ntouch b", "a\\b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(ConfigError, match="must be one line of a script without backslashes"):
            script(tiny_values(tmp_path / "run"), tmp_path)


def test_percent_signs_in_folders_are_no_patterns_of_slurm(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "100 %j")
    assert log_pattern(config, "expert", 6, True) == f"{tmp_path}/100 %%j/cluster/logs/expert-6+%a.log"
    assert log_file(config, "expert", 7, 6) == tmp_path / "100 %j" / "cluster" / "logs" / "expert-6+1.log"
    assert log_file(tiny_config(tmp_path / "%a"), "expert", 7).name == "expert-7.log"
    assert "%a" in str(log_file(tiny_config(tmp_path / "%a"), "expert", 7))


RUNS = [
    "s3://exp/a-b",
    "s3://exp/a/b",
    "s3-exp://a/b",
    "s3://exp-a/b",
    "/exp/a/b",
    "s3://exp/a b",
    "s3://exp/" + "x" * 400,
]


def test_runs_whose_names_read_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    configs = [tiny_config(run, cluster={"work_dir": str(tmp_path)}) for run in RUNS]
    assert len({work_folder(config) for config in configs}) == len(RUNS)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,120}", work_folder(config).name) for config in configs)


def test_logs_of_submissions_by_an_older_launcher_are_found_in_their_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.status.queue", lambda names: [])
    config = tiny_config("memory://exp/a/b", cluster={"work_dir": str(tmp_path)})
    record = new_record(config)
    record.submissions = [
        Submission("a", "backbone", job="1"),
        Submission("b", "expert", [0], 0, "2", work=folder_name(config.output_dir)),
    ]
    logs = {row.task: row.log for row in read_status(config, record)}
    assert logs["backbone"] == f"{tmp_path}/memory-exp-a-b/logs/backbone.log"
    assert logs["expert-0"] == str(log_file(config, "expert", 0))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"output_dir": "ftp://me:hunter22@host/run"}, "output_dir"),
        ({"data_dir": "https://host/x?X-Amz-Signature=hunter22"}, "data_dir"),
    ],
)
def test_settings_with_a_password_start_no_jobs(values: dict[str, str], name: str) -> None:
    config = make_config(tiny_values("run") | values, "here")
    with pytest.raises(ConfigError, match=f"^{name} must hold no password") as caught:
        describe_plan(config)
    assert "hunter22" not in str(caught.value)
    assert "hunter22" not in folder_name(config.output_dir)


@pytest.mark.parametrize(
    ("name", "value"), [("setup", ["curl x | sh"]), ("python", "/tmp/x"), ("pass_environment", ["*"])]
)
def test_commands_in_a_record_that_others_can_write_are_not_run(name: str, value: object) -> None:
    given, recorded = tiny_config("memory://b/run"), tiny_config("memory://b/run", cluster={name: value})
    with pytest.raises(ConfigError, match=rf"cluster\.{name} in the record of memory://b/run must be what --config"):
        check_commands(given, recorded)
    check_commands(recorded, recorded)
    check_commands(given, given)
    check_commands(tiny_config("run"), tiny_config("run", cluster={name: value}))


def test_nothing_is_written_for_settings_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = tiny_values(tmp_path / "run", data_dir="ftp://me:hunter22@host/data")
    config = make_config(values, "here")
    for start in (LocalLauncher(config, build_tasks(config), print).run, lambda: launch(config, print)):
        with pytest.raises(ConfigError, match="data_dir must hold no password"):
            start()
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_prints_and_errors_show_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    say("s3://me:other-secret@host/x hunter22")

    def failing() -> None:
        raise ConfigError("x must be y, but is https://h/?sig=other-secret hunter22; change it")

    with pytest.raises(SystemExit):
        run_app(failing)
    shown = capsys.readouterr()
    assert "secret" not in shown.out + shown.err
    assert "hunter22" not in shown.out + shown.err
    assert "change it" in shown.err


def test_folders_that_read_like_fields_of_slurm_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "JobId=7 JobName=backbone-1 JobState=RUNNING Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 "
        "Command=/runs/a JobState=FAILED Restarts=9 PreemptTime=2030-01-01T00:00:00/x.sh WorkDir=/runs/a RunTime=x"
    )
    monkeypatch.setattr(slurm, "run_slurm", lambda *command: told)
    found = slurm.job_fields("7")
    assert (found["JobState"], found["Restarts"], found["RunTime"]) == ("RUNNING", "0", "00:01:00")
    assert "PreemptTime" not in found
    assert slurm.fields("NodeName=n NodeAddr=10.0.0.1 Comment=was NodeAddr=6.6.6.6")["NodeAddr"] == "10.0.0.1"


def test_numbers_of_slurm_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT must be a number from Slurm, but is 'x'"):
        Allocation.of_this_job(None)


def test_an_account_of_a_container_store_is_no_password() -> None:
    assert describe_plan(tiny_config("abfs://container@account.dfs.core.windows.net/run"))


def test_commands_that_are_shown_can_be_pasted() -> None:
    words = ["modularforge", "generate", "--model", "it's a $(run)\\ & more", "--prompt", "The"]
    assert shlex.split(shown_command(*words)) == words
    assert shown_command("x", "s3://me:hunter22@host/y") == "x 's3://***@host/y'"


def test_the_command_to_try_names_a_run_with_blanks_so_that_a_shell_takes_it(
    finished_run: Config, tmp_path: Path
) -> None:
    from modularforge.stages.evaluate import where

    (tmp_path / "a run's").symlink_to(finished_run.output_dir)
    moved = finished_run.model_copy(update={"output_dir": str(tmp_path / "a run's")})
    line = next(line for line in where(Run(moved)).splitlines() if line.startswith("try it:"))
    words = shlex.split(line.removeprefix("try it:"))
    assert Path(words[words.index("--model") + 1]).is_dir()
