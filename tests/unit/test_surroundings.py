"""What shells, containers and crashes leave in a program's surroundings: torchrun's variables, no home, old folders."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from checkpoints import StoreError, paths
from checkpoints.options import cache_folder
from launcher.processes import LocalLauncher
from launcher.tasks import build_tasks
from modularforge.errors import ConfigError
from modularforge.log import configure_logging
from modularforge.ranks import VARIABLES, Ranks, is_quiet, own_rank
from tests.conftest import ROOT, tiny_config

NOBODY = 54321  # no user of any system


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_variables_that_torchrun_set_are_believed(alone: pytest.MonkeyPatch) -> None:
    assert own_rank() == Ranks(0, 0, 1)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}.items():
        alone.setenv(name, value)
    assert own_rank() == Ranks(3, 1, 4)
    assert is_quiet()


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "many"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "2", "RANK": "x", "TORCHELASTIC_RUN_ID": "1"},
    ],
)
def test_left_over_variables_are_named_in_one_sentence(alone: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        alone.setenv(name, value)
    names = " ".join(name for name in VARIABLES if name in left)
    with pytest.raises(ConfigError, match=f"unset {names}, or start it with torchrun"):
        own_rank()


@pytest.mark.parametrize(
    "left", [{"RANK": "1"}, {"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "WORLD_SIZE": "1"}]
)
def test_left_over_ranks_of_nothing_change_nothing(alone: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        alone.setenv(name, value)
    assert own_rank() == Ranks(0, 0, 1)
    configure_logging(quiet=is_quiet())
    assert logging.getLogger("modularforge").level == logging.INFO


def test_a_training_that_torchrun_did_not_start_does_not_wait_for_others(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("WORLD_SIZE", "2")
    from modularforge.training.distributed import joined_world

    with pytest.raises(ConfigError, match="WORLD_SIZE must be set by torchrun alone"), joined_world():
        pass


def test_the_local_launcher_passes_no_ranks_on(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        alone.setenv(name, "7")
    config = tiny_config(tmp_path / "run")
    tasks = build_tasks(config)
    assert not set(VARIABLES) & set(LocalLauncher(config, tasks, print)._environment(tasks[1], 0))


def without_home(**variables: str) -> subprocess.CompletedProcess[str]:
    """Ask for the cache folder as a user whom the system does not know, without HOME."""
    asked = ("HOME", "MODULARFORGE_CACHE", "USER", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in asked}
    program = f"from checkpoints.options import cache_folder; import os; os.setuid({NOBODY}); print(cache_folder())"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user whom nobody knows")
def test_a_user_without_a_home_needs_none_while_variables_answer() -> None:
    assert without_home(MODULARFORGE_CACHE="/x").stdout == "/x\n"
    assert without_home(XDG_CACHE_HOME="/y").stdout == "/y/modularforge\n"
    assert "set HOME or MODULARFORGE_CACHE" in without_home().stderr.splitlines()[-1]


def test_a_home_is_asked_for_only_when_no_variable_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.setenv("MODULARFORGE_CACHE", "/x")
    assert cache_folder() == Path("/x")
    monkeypatch.delenv("MODULARFORGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert cache_folder() == Path("/y/modularforge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(StoreError, match=r"home folder must be known, but .* set HOME or MODULARFORGE_CACHE"):
        cache_folder()


def test_a_path_below_an_unknown_home_is_refused_with_a_sentence() -> None:
    with pytest.raises(StoreError, match="~nobody-of-this-name is none"):
        paths.local_path("~nobody-of-this-name/run")


def test_changes_that_are_no_text_in_utf8_are_told_by_git_all_the_same(tmp_path: Path) -> None:
    from modularforge.provenance import _git

    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    (tmp_path / "a.txt").write_text("a\n")
    for arguments in (["init", "--quiet"], ["add", "a.txt"], [*identity, "commit", "--quiet", "--message=a"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    (tmp_path / "a.txt").write_bytes("café\n".encode("latin-1"))
    assert "+caf\ufffd" in (_git(tmp_path, "diff", "HEAD") or "")


def test_slurm_is_asked_for_jobs_without_the_users_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import slurm

    asked: list[str] = []

    def run_slurm(*command: str) -> str:
        asked.extend(command)
        return ""

    monkeypatch.setattr(slurm, "run_slurm", run_slurm)
    assert slurm.queue(["x"]) == []
    assert f"--user={os.getuid()}" in asked


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_itself_leaves_no_empty_folders(processes: int, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "from modularforge.training.distributed import joined_world\nwith joined_world() as world: world.barrier()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(script)], check=True, env=environment, cwd=ROOT)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_a_killed_torchrun_left_is_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    command = [sys.executable, "-m", "modularforge.training.elastic", "--standalone", "--nproc-per-node=1", str(script)]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    started = tmp_path / "started"
    process = subprocess.Popen([*command, str(started)], cwd=ROOT, env=environment, start_new_session=True)
    end = time.monotonic() + 60
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name.startswith("modularforge-torchrun-") for path in temporary.iterdir()] == [True]
    script.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    from modularforge.training.elastic import main

    (temporary / f"modularforge-torchrun-{os.getppid()}-x").mkdir()  # of a process that is there
    assert main(["--standalone", "--nproc-per-node=1", str(script)]) == 0
    assert [path.name for path in temporary.iterdir()] == [f"modularforge-torchrun-{os.getppid()}-x"]
