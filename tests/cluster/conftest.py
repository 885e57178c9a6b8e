"""A real Slurm for the tests of this folder, and runs to launch on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoints import find_artifact, paths
from launcher.events import Event, read_events
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.provenance import commit, making
from modularforge.run import Run
from tests.cluster.packages import missing_programs
from tests.cluster.slurm import Cluster, remove, wait_for
from tests.conftest import ROOT, tiny_values

STUB = Path(__file__).with_name("stub.py")
NODES = {"backbone": {"nodes": 2, "cpus": 1}, "expert": {"cpus": 1}, "other": {"cpus": 1}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Slurm, or without the rights to run it, every test of this folder is skipped and says so."""
    reason = f"Slurm is not installed ({', '.join(missing_programs())}): `make test-cluster` installs it"
    if not missing_programs():
        reason = "" if os.getuid() == 0 else "slurmd and munged need root here"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))  # the first test of a module waits for its whole run
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Four nodes of two CPUs; arrays of at most six tasks."""
    folder = Path(tempfile.mkdtemp(prefix="mf-slurm-"))  # Slurm's sockets allow only short paths
    cluster = Cluster(folder / "c")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        remove(folder)


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without jobs, before and after."""
    yield session_cluster
    session_cluster.run("scancel", "--user=root")
    wait_for(lambda: not session_cluster.jobs(), "all jobs have ended")


@dataclass
class Launched:
    """One run on a cluster: its settings and the launcher's commands."""

    cluster: Cluster
    values: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Root of the run."""
        return Path(self.values["output_dir"])

    @property
    def config(self) -> Config:
        """Its settings."""
        return make_config(self.values, "tests")

    @property
    def config_file(self) -> Path:
        """Its settings as a file, which another command may be reading."""
        path, text = self.folder.with_name(f"{self.folder.name}.yaml"), yaml.safe_dump(self.values)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a launcher command."""
        environment = {**self.cluster.environ, "OMP_NUM_THREADS": "1", **self.environment}
        words = [sys.executable, "-m", "launcher", *arguments, "--config", str(self.config_file)]
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def launcher(self, *arguments: str, code: int = 0) -> str:
        """Run a launcher command; what it printed, errors included."""
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=280)
        assert process.returncode == code, f"{arguments} ended with {process.returncode}:\n{output}\n{errors}"
        return output + errors

    def submit(self, *arguments: str) -> str:
        """Launch without the preflight, which one test has."""
        return self.launcher("--cluster", "--no-preflight", *arguments)

    def rows(self) -> dict[str, dict[str, Any]]:
        """What `status --json` says, by job."""
        return {row["task"]: row for row in json.loads(self.launcher("status", "--json"))}

    def job(self, group: str) -> str:
        """Slurm job id of the newest submission of a group."""
        record = json.loads((self.folder / "cluster" / "run.json").read_text())
        return [item["job"] for item in record["submissions"] if item["group"] == group and item["job"]][-1]

    def submissions(self) -> list[dict[str, Any]]:
        """What the run record says was submitted."""
        found: list[dict[str, Any]] = json.loads((self.folder / "cluster" / "run.json").read_text())["submissions"]
        return found

    def events(self, job: str, kind: str = "") -> list[Event]:
        """What a job noted."""
        return [event for event in read_events(self.config, job) if kind in ("", event["event"])]

    def has(self, folder: str) -> bool:
        """Whether an artifact is committed."""
        return find_artifact(paths.join(str(self.folder), folder)) is not None

    def wait_for_artifact(self, folder: str, seconds: float = 120.0) -> None:
        """Wait until an artifact is committed."""
        wait_for(lambda: self.has(folder), f"{folder} is committed", seconds)

    def wait_for_step(self, job: str, step: int, seconds: float = 90.0) -> None:
        """Wait until a training has written metrics at or after a step."""
        file = self.folder / "metrics" / f"{job}.jsonl"

        def reached() -> bool:
            lines = file.read_text().splitlines() if file.exists() else []
            return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))

        wait_for(reached, f"{job} reaches step {step}", seconds)

    def losses(self, job: str) -> list[tuple[int, float]]:
        """Training loss by step."""
        lines = [json.loads(line) for line in (self.folder / "metrics" / f"{job}.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture
def new_run(cluster: Cluster, tmp_path: Path) -> Callable[..., Launched]:
    """Make a run that was never launched; sections of the settings are given by name."""

    def make(name: str = "run", **changes: Any) -> Launched:
        sections = {"evaluation": {"baselines": []}, **changes}
        sections["cluster"] = {**NODES, **changes.get("cluster", {})}
        return Launched(cluster, tiny_values(tmp_path / name, **sections))

    return make


@pytest.fixture
def trained_run(new_run: Callable[..., Launched], finished_run: Config) -> Callable[..., Launched]:
    """Make a run whose data and backbone are finished."""

    def make(name: str = "run", **changes: Any) -> Launched:
        run = new_run(name, **changes)
        for folder in ("data", "backbone"):
            shutil.copytree(Path(finished_run.output_dir) / folder, run.folder / folder)
        return run

    return make


def commit_partitions(config: Config) -> None:
    """Commit partitions without text, which stand-ins never read."""
    plan = Run(config).plan("partition")
    with making(plan) as writer:
        for index in range(config.experts.count):
            (writer.folder / f"partition-{index}.tokens.bin").write_text(str(index))
        commit(writer, plan, Run(config), {})


@pytest.fixture
def stub_run(trained_run: Callable[..., Launched], tmp_path: Path) -> Callable[..., Launched]:
    """Make a run whose experts are stand-ins of a second (see stub.py), with as many partitions as asked for."""

    def make(mode: str, count: int = 3, **changes: Any) -> Launched:
        (tmp_path / "stub").mkdir(exist_ok=True)
        container = f"{sys.executable} {STUB} {mode} {tmp_path / 'stub'}"
        changes["cluster"] = {"container": container, **changes.get("cluster", {})}
        if count != 3:
            changes |= {"experts": {"count": count}, "partition": {"method": "random"}}
        run = trained_run(**changes)
        if count != 3:
            shutil.rmtree(run.folder / "data" / "partitions")
            commit_partitions(run.config)
        return run

    return make
