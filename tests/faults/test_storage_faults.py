"""Full disks, read-only folders, files that vanish, and an S3 server that dies or is slow, in the middle of a run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import paths
from tests.faults.runs import (
    COMMANDS,
    KILLS,
    STAGES,
    Run,
    assert_same_stage,
    assert_undisturbed,
    copy_before,
    kill_until_finished,
)
from tests.faults.runs import values as settings
from tests.storage.conftest import BUCKET, use_environment
from tests.storage.proxy import Fault, FaultProxy, Request
from tests.storage.server import Server, start_server

MakeRun = Callable[..., Run]

STOPS_OF_ONE_STAGE = 6


class Disk:
    """A disk of its own, whose size and rights change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")

    def resize(self, size: int) -> None:
        self.mount("-o", f"remount,size={size // 1024}k")

    def forbid(self, read_only: bool) -> None:
        self.mount("-o", f"remount,{'ro' if read_only else 'rw'}")

    def used(self) -> int:
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this process may not mount a disk: {error.stderr.decode().strip()}")
    yield disk
    disk.unmount()


def test_a_disk_that_is_full_at_every_write(disk: Disk, tmp_path: Path, reference: Run) -> None:
    """The disk grows by a few KiB whenever it was full: every stage meets its end at many places, and says so."""
    run = Run(settings(disk.folder / "run"), tmp_path / "run", {"TMPDIR": str(disk.folder)})
    size = 128 * 1024
    for _ in range(400):
        disk.resize(size)
        stage = run.stage_at_work()
        before = len(run.said())
        code = run.finish("run-all")
        if code == 0:
            break
        said = run.said()[before:]
        assert code == 2, said
        assert "full" in said, said
        assert "Traceback" not in said, said
        KILLS["local", stage, "disk full"] += 1
        size = max(size, disk.used()) + 96 * 1024
    else:
        raise AssertionError("it never came to an end")
    assert_undisturbed(run, reference)


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_becomes_read_only(stage: str, disk: Disk, tmp_path: Path, reference: Run) -> None:
    run = Run(settings(disk.folder / "run"), disk.folder / "run")
    copy_before(stage, reference, run)
    run.place = tmp_path / "run"
    luck, stopped = random.Random(stage), 0
    while True:
        process = run.start(*COMMANDS[stage])
        process.join(luck.expovariate(5) if stopped < STOPS_OF_ONE_STAGE else 240)
        is_forbidden = forbid(disk, process)
        process.join(240)
        disk.forbid(False)
        assert process.exitcode in (0, 2), run.said()
        assert "Traceback" not in run.said(), run.said()
        if process.exitcode == 0:
            break
        KILLS["local", stage, "read-only"] += is_forbidden
        stopped += 1
    assert_same_stage(stage, run, reference)


def forbid(disk: Disk, process: Any) -> bool:
    """Make the disk read-only while the process lives; Linux refuses while a file is open for writing."""
    while process.exitcode is None:
        try:
            disk.forbid(True)
            return True
        except subprocess.CalledProcessError:
            process.join(0.01)
    return False


INPUTS = {
    "backbone": "data/train.tokens.bin",
    "expert": "data/partitions/partition-0.tokens.bin",
    "dense": "data/partitions/partition-1.tokens.bin",
    "assemble": "experts/expert-1/expert.safetensors",
    "evaluate": "backbone/model.safetensors",
}


@pytest.mark.parametrize("stage", INPUTS)
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_file_that_is_deleted_meanwhile(stage: str, seconds: float, new_run: MakeRun, reference: Run) -> None:
    """The stage ends with a sentence that names the file, or has read it already; brought back, all goes on."""
    run = new_run()
    copy_before(stage, reference, run)
    files = [path for path in (run.place / INPUTS[stage]).parent.iterdir() if path.name == Path(INPUTS[stage]).name]
    file = files[0] if files else next((run.place / INPUTS[stage]).parent.glob("*.bin"))
    process = run.start(*COMMANDS[stage])
    process.join(seconds)
    file.rename(file.with_name("gone"))
    process.join(240)
    assert process.exitcode in (0, 2), run.said()
    assert process.exitcode == 0 or file.name in run.said()
    assert "Traceback" not in run.said(), run.said()
    KILLS["local", stage, "file deleted"] += 1
    file.with_name("gone").rename(file)
    assert run.finish(*COMMANDS[stage]) == 0, run.said()
    assert_same_stage(stage, run, reference)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 server of this test alone, which may be killed."""
    server = start_server(tmp_path)
    use_environment(monkeypatch, server.environment())
    paths.store_of("s3://x")._client.create_bucket(Bucket=BUCKET)  # type: ignore[union-attr]
    yield server
    server.process.kill()


def remote(server: Server, folder: Path, port: int = 0) -> Run:
    environment = {**server.environment(port), "AWS_MAX_ATTEMPTS": "12", "MODULARFORGE_CACHE": str(folder / "cache")}
    return Run(settings(f"s3://{BUCKET}/run"), folder / "run", environment)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_on_s3_that_is_killed_again_and_again(seed: int, server: Server, tmp_path: Path, reference: Run) -> None:
    run = remote(server, tmp_path)
    kill_until_finished(run, lambda: run.start("run-all"), random.Random(seed), "s3", signal.SIGKILL)
    assert_undisturbed(run, reference)


def test_an_s3_server_that_is_gone_again_and_again(server: Server, tmp_path: Path, reference: Run) -> None:
    """Every few seconds it is gone for a few: the run waits and goes on, without being started again.

    It is ended with SIGTERM, because this server forgets its buckets after a SIGKILL; for the run it is the same.
    """
    run, luck = remote(server, tmp_path), random.Random(1)
    process = run.start("run-all")
    for _ in range(6):
        process.join(luck.uniform(0.5, 3))
        if process.exitcode is not None:
            break
        server.stop()
        KILLS["s3", run_stage(reference, run), "server gone"] += 1
        time.sleep(luck.uniform(1, 4))
        restart(server, tmp_path)
    process.join(240)
    assert process.exitcode == 0, run.said()
    assert_undisturbed(run, reference)


def run_stage(reference: Run, run: Run) -> str:
    """The stage at work by what the run said, as nobody can ask the server now."""
    said = run.said()
    return next((name for name, folders in STAGES.items() if f"/{folders[-1]}\n" not in said), "end")


def restart(server: Server, folder: Path) -> None:
    """The same server with the same files on the same port."""
    again = start_server(folder, server.port)
    server.process = again.process


def test_an_s3_server_that_is_slow(server: Server, tmp_path: Path, reference: Run) -> None:
    """Every twentieth request takes a second, every fiftieth is refused with SlowDown."""
    proxy = FaultProxy(server.port)

    def slow(request: Request) -> Fault | None:
        if request.number % 50 == 0:
            return Fault("answer", 503, "SlowDown")
        return Fault("do", action=lambda: time.sleep(1)) if request.number % 20 == 0 else None

    proxy.reset(slow)
    run = remote(server, tmp_path, proxy.port)
    assert run.finish("run-all", seconds=900) == 0, run.said()
    KILLS["s3", "all", "slow requests"] += len(proxy.requests) // 20
    assert_undisturbed(run, reference)
    proxy.close()
