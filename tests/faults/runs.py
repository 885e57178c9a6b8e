"""Small runs with every stage and baseline, commands on them as real processes, and whether a run came out undisturbed.

Processes are forked from a server that has imported everything, so that a killed one costs no second of imports and
nearly all kills meet it at work. What is forked is the program itself, with its own arguments and signals.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from checkpoints import garbage, open_artifact, paths
from checkpoints.artifact import examine
from checkpoints.errors import MissingArtifactError
from checkpoints.manifest import CHECKPOINT_KIND
from modularforge.config import Config
from modularforge.config_files import make_config
from tests.conftest import tiny_values

BASELINES = ["dense", "soup", "joint", "btx"]
# In the order of `run-all`: the first that is not there is the one at work.
STAGES = {
    "prepare-data": ("data", "data/partitions"),
    "backbone": ("backbone",),
    "expert": tuple(f"experts/expert-{index}" for index in range(3)),
    "assemble": ("assembled", "calibrated"),
    "dense": ("baselines/dense",),
    "joint": ("baselines/joint",),
    "branch": tuple(f"baselines/branches/branch-{index}" for index in range(3)),
    "evaluate": ("evaluation",),
}
COMMANDS = {
    "prepare-data": ("prepare-data",),
    "backbone": ("train", "--only", "backbone"),
    "expert": ("train", "--only", "expert", "--index", "0"),
    "assemble": ("assemble",),
    "dense": ("train", "--only", "dense"),
    "joint": ("train", "--only", "joint"),
    "branch": ("train", "--only", "branch", "--index", "0"),
    "evaluate": ("evaluate",),
}
PRELOADED = ["modularforge.cli", "modularforge.exits", "modularforge.stages.evaluate", "modularforge.stages.prepare"]
FORKING = multiprocessing.get_context("forkserver")

KILLS: Counter[tuple[str, str, str]] = Counter()
"""(where, stage at work, what was done to it): printed at the end of the campaign."""


def values(output_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """Settings of a run with every baseline whose trainings last long enough to be met in the middle."""
    long = {"steps": 60}
    return tiny_values(
        output_dir,
        backbone={"steps": 80},
        experts={"anchored": False, **long},
        calibration={"steps": 20},
        assembly={"router": "evidence"},
        evaluation={"baselines": BASELINES},
        **changes,
    )


@dataclass
class Run:
    """One run and the files that belong to it: settings and log lie beside its folder."""

    values: dict[str, Any]
    place: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.values["output_dir"])

    @property
    def config(self) -> Config:
        return make_config(self.values, "tests")

    @property
    def log(self) -> Path:
        return self.place.with_name(f"{self.place.name}.log")

    @property
    def settings(self) -> str:
        """The settings as a file, for commands."""
        path = self.place.with_name(f"{self.place.name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.values))
        return str(path)

    def start(self, *arguments: str) -> Any:
        """Begin a command of `modularforge` on this run, in a process group of its own."""
        FORKING.set_forkserver_preload(PRELOADED)
        words = [*arguments, "--config", self.settings]
        process = FORKING.Process(target=_command, args=(words, str(self.log), self.environment))
        process.start()
        return process

    def finish(self, *arguments: str, seconds: float = 240.0) -> int:
        """Run a command to its end; its exit code."""
        process = self.start(*arguments)
        process.join(seconds)
        assert process.exitcode is not None, f"{arguments} did not end within {seconds} s:\n{self.said()}"
        return int(process.exitcode)

    def said(self) -> str:
        """What the commands have printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def has(self, folder: str) -> bool:
        """Whether an artifact is committed, by its manifest alone."""
        return paths.exists(paths.join(self.url, folder, "manifest.json"))

    def stage_at_work(self) -> str:
        """The first stage with something missing, or `end`."""
        unfinished = (name for name, folders in STAGES.items() if not all(self.has(folder) for folder in folders))
        return next(unfinished, "end")


def _command(words: list[str], log: str, environment: dict[str, str]) -> None:
    """The whole program, in a forked process."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    sys.argv = ["modularforge", *words]
    garbage.STARTED = time.time()  # it was imported before this process began
    from modularforge.__main__ import main

    main()


def artifacts(url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Fingerprint, and size and hashes of all files, of every artifact of a run but its training checkpoints."""
    try:
        found, damaged = examine(url)
    except MissingArtifactError:
        return {}
    assert not damaged, damaged
    return {
        paths.relative(artifact.url, url): (artifact.manifest.fingerprint, dict(artifact.manifest.files))
        for artifact in found
        if artifact.manifest.kind != CHECKPOINT_KIND
    }


def assert_undisturbed(run: Run, reference: Run) -> None:
    """Every artifact of the reference is there with the same bytes, the bytes are whole, and there are no others."""
    expected, found = artifacts(reference.url), artifacts(run.url)
    assert sorted(found) == sorted(expected)
    different = [name for name in expected if found[name] != expected[name] and name != "evaluation"]
    assert not different, {name: (found[name], expected[name]) for name in different[:1]}
    assert measured(run) == measured(reference)
    whole, _ = examine(run.url)
    assert not [problem for artifact in whole for problem in artifact.problems()]
    for job in ("backbone", "expert-0", "expert-2", "dense", "joint", "branch-1"):
        assert losses(run, job) == losses(reference, job), job


def assert_same_stage(stage: str, run: Run, reference: Run) -> None:
    """What a stage has made, the first of its artifacts at least, is what it made undisturbed."""
    made, expected = artifacts(run.url), artifacts(reference.url)
    assert STAGES[stage][0] in made
    if stage != "evaluate":  # which evaluates what is there
        folders = [name for name in STAGES[stage] if name in made]
        assert {name: made[name] for name in folders} == {name: expected[name] for name in folders}


def measured(run: Run) -> dict[str, Any]:
    """The evaluation, less what it cost: seconds and memory are never the same twice."""
    results = open_artifact(paths.join(run.url, "evaluation")).read_json("results.json")
    return {name: value for name, value in results.items() if name not in ("seconds", "peak_memory_bytes")}


def losses(run: Run, job: str) -> list[tuple[int, float]]:
    """(step, validation loss) of a job: bit for bit those of an undisturbed run, each step once.

    Training losses are means since the last line, and a job that is asked to stop writes one more line.
    """
    lines = paths.read_bytes(paths.join(run.url, "metrics", f"{job}.jsonl")).splitlines()
    return [(line["step"], line["validation_loss"]) for line in map(json.loads, lines) if "validation_loss" in line]


def kill_until_finished(run: Run, start: Callable[[], Any], luck: random.Random, where: str, number: int) -> None:
    """Run a command again and again, each time killed after a random time, until it ends by itself with 0.

    Times are of three kinds, so that beginnings, short stages and long ones are all met.
    """
    for _ in range(400):
        process = start()
        process.join(luck.expovariate(1 / luck.choice((0.1, 0.5, 2.0))))
        if (code := process.exitcode) is not None:
            assert code == 0, f"ended with {code}:\n{run.said()[-3000:]}"
            return
        stage = run.stage_at_work()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(60)
        if process.exitcode == 0:  # it was faster
            return
        assert process.exitcode is not None
        KILLS[where, stage, signal.Signals(number).name] += 1
    raise AssertionError("it never came to an end")


def leftovers(place: Path) -> list[str]:
    """Unfinished folders that nobody owns any more; small hidden files have no owner and stay for an hour."""
    names = (".attempt-", ".partial")
    return [
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path.is_dir() and any(name in path.name for name in names)
    ]


def copy_before(stage: str, reference: Run, run: Run) -> None:
    """What the stages before this one made."""
    for name, folders in STAGES.items():
        if name == stage:
            return
        for folder in folders:
            if not run.has(folder):
                shutil.copytree(reference.place / folder, run.place / folder, dirs_exist_ok=True)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    """Look again and again until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)
