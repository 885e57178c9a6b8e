"""Whatever call a job is killed at, the newest committed checkpoint loads bit for bit (C1)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from checkpoints import paths
from checkpoints.garbage import delete_garbage, find_garbage
from checkpoints.objects import ObjectStore
from checkpoints.training import load_newest_checkpoint
from tests.storage import jobs
from tests.storage.conftest import BUCKET
from tests.storage.proxy import Fault, FaultProxy
from tests.storage.server import Server


def check_after_death(url: str, notes: Path) -> int:
    """The newest checkpoint is right, not older than what was reported, and a new job can go on and clean up."""
    found = load_newest_checkpoint(url, jobs.FINGERPRINT)
    assert found is not None
    assert jobs.is_right(found)
    assert found.step >= jobs.last_note(notes)
    return found.step


def go_on_and_clean_up(url: str, step: int) -> None:
    """The next job saves the next step; afterwards garbage collection leaves that checkpoint and nothing else."""
    jobs.save(url, step + 1)
    delete_garbage(find_garbage(url, grace_seconds=0))
    assert find_garbage(url, grace_seconds=0) == []
    found = load_newest_checkpoint(url, jobs.FINGERPRINT)
    assert jobs.is_right(found)
    assert len(paths.walk(url)) == 3
    if paths.is_local(url):
        assert os.listdir(url) == [f"step-{step + 1:08d}"]


def test_c1_killed_at_every_call_on_a_folder(tmp_path: Path) -> None:
    """A real process ends without clean-up before its n-th open, mkdir, fsync, rename, link or remove, for every n."""
    deaths = 0
    for number in range(1, 1000):
        url, notes = str(tmp_path / f"job-{number}"), tmp_path / f"notes-{number}"
        jobs.save(url, 1)
        process = jobs.start(jobs.die_at_call, number, url, notes)
        process.join(60)
        step = check_after_death(url, notes)
        if process.exitcode == 0:
            break
        assert process.exitcode == jobs.KILLED
        deaths += 1
        go_on_and_clean_up(url, step)
    assert deaths > 50


class Died(BaseException):
    """The process is gone: nobody catches this."""


class DyingFiles(MemoryFileSystem):  # type: ignore[misc]
    """A store that dies at call n and answers nothing ever after."""

    cachable = False

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls_left = calls

    def __getattribute__(self, name: str) -> Any:
        if name in ("cat_file", "info", "pipe_file", "open", "ls", "find", "rm_file"):
            self.calls_left -= 1
            if self.calls_left <= 0:
                raise Died
        return super().__getattribute__(name)


def test_c1_the_store_dies_at_every_call_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here also the clean-up of the dying writer meets a dead store."""
    deaths = 0
    for number in range(1, 1000):
        url, notes = f"memory://{uuid.uuid4().hex}/job", tmp_path / f"notes-{number}"
        jobs.save(url, 1)
        with monkeypatch.context() as patch:
            store = ObjectStore(DyingFiles(number), "memory")
            patch.setattr(paths, "_object_store", lambda *_, store=store: store)
            try:
                jobs.cycle(url, notes)
                break
            except Died:
                deaths += 1
        go_on_and_clean_up(url, check_after_death(url, notes))
    assert deaths > 30


def test_c1_killed_at_every_request_on_s3(proxy: FaultProxy, server: Server, tmp_path: Path) -> None:
    """SIGKILL when the n-th request arrives at the server, for every n; the request itself is still carried out."""
    deaths = 0
    for number in range(1, 1000):
        url, notes = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/job", tmp_path / f"notes-{number}"
        jobs.save(url, 1)
        proxy.reset()
        process = jobs.start(jobs.cycle, url, notes, environment=server.environment(proxy.port))
        proxy.rule = kill_at(number, process)
        process.join(60)
        proxy.reset()
        step = check_after_death(url, notes)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        if number % 5 == 0:
            go_on_and_clean_up(url, step)
    assert deaths > 30


def kill_at(number: int, process: Any) -> Callable[[Any], Fault | None]:
    """A rule of the proxy: the client is gone before its request is answered."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)

    return lambda request: Fault("do", action=kill) if request.number == number else None


def kill_at_random_times(url: str, folder: Path, times: int, environment: dict[str, str]) -> None:
    """One job after the other goes on where the last was killed, at a random moment of its background saves."""
    notes, luck = folder / "notes", random.Random(0)
    newest = 0
    for _ in range(times):
        process = jobs.start(jobs.endless, url, notes, environment=environment)
        before = jobs.last_note(notes)
        jobs.wait_for(lambda before=before: jobs.last_note(notes) > before)  # type: ignore[misc]
        time.sleep(luck.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        step = check_after_death(url, notes)
        assert step >= newest
        newest = step


def test_c1_15_sigkills_at_random_times(tmp_path: Path) -> None:
    kill_at_random_times(str(tmp_path / "job"), tmp_path, 15, {})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_c1_200_sigkills_at_random_times(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, server: Server
) -> None:
    url = str(tmp_path / "job") if kind == "folder" else request.getfixturevalue("s3")
    kill_at_random_times(url, tmp_path, 200, server.environment())
