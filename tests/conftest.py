"""Shared by all tests: small settings, and one finished tiny run that many tests read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from modularforge.config import Config
from modularforge.config_files import SMOKE_TEST, make_config, sample_sources
from modularforge.pipeline import STAGES
from modularforge.run import Run
from tests.forks import run_forked

ROOT = Path(__file__).resolve().parent.parent
OURS = ("modularforge", "launcher", "checkpoints")
AT_START = ("PYTHON", "OMP_", "MALLOC_", "LD_", "LANG", "LC_", "HF_")
THREADS = "1"  # results are compared bit for bit between processes, so all use the same number of threads
os.environ["OMP_NUM_THREADS"] = THREADS
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Containers often set this; each of a thousand processes would compile our modules anew, which takes 0.2 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def tiny_values(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """Settings of a run of seconds on three domains; `changes` replace whole sections' entries."""
    values: dict[str, Any] = {name: dict(section) for name, section in SMOKE_TEST.items()}
    values["data"]["sources"] = sample_sources()[:3]
    values["data"]["max_documents_per_source"] = 20
    values["experts"] |= {"count": 3, "anchored": True}
    values["partition"] = {"method": "domain"}
    values["assembly"] = {"router": "trained"}
    values["output_dir"] = str(output_dir)
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    if "partition" not in changes and values["experts"]["count"] != len(values["data"]["sources"]):
        values["partition"] = {"method": "random"}  # partitions by domain need one expert a domain
    return values


def tiny_config(output_dir: Path | str, **changes: Any) -> Config:
    """The same as a validated config."""
    return make_config(tiny_values(output_dir, **changes), "tests")


def run_command(
    *arguments: str, check: bool = True, env: dict[str, str] | None = None, input: str = "", forked: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` as a user would, in the repository; forked from a process that has imported what it needs.

    That saves a second or two. Not so for programs of the tests, and variables that Python or libraries read at their
    start; where the start is what is tested, `forked` is false.
    """
    environment = {**os.environ, **(env or {})}
    if forked and arguments[0] in OURS and not any(name.startswith(AT_START) for name in env or {}):
        done = run_forked(arguments, ROOT, environment, input)
    else:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, input=input)
    if check and done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Where several files are tested at a time, tests of one stay together, as do all that share the Slurm cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "tests/cluster" if file.startswith("tests/cluster/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny anchored run with every stage finished; tests must not change it."""
    config = tiny_config(tmp_path_factory.mktemp("run") / "run")
    run_every_stage(config)
    return config


def run_every_stage(config: Config) -> dict[str, Any]:
    """Run the whole pipeline in this process, with all baselines it names, and return the results of its evaluation."""
    run, results = Run(config), None
    for stage in STAGES.values():
        if stage.is_wanted(config) or stage.name == "dense":
            for index in stage.indices(config):
                results = run.make(stage.name, index)
    assert results is not None
    return results


def prepare_data(config: Config) -> Any:
    """Corpus and partitions of a run; returns the corpus."""
    run = Run(config)
    corpus = run.make("prepare-data")
    run.make("partition")
    return corpus
