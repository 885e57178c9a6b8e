"""Training jobs that are killed: they save, retain and load, and note each save that was reported as done."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints.saver import CheckpointSaver
from checkpoints.training import Checkpoint, load_newest_checkpoint, save_checkpoint

FINGERPRINT = "f"
KILLED = 137
EVENTS = ("open", "os.", "shutil.", "fsync")


def content(step: int) -> dict[str, torch.Tensor]:
    """What the checkpoint of a step holds."""
    return {"weight": torch.full((3, 500), float(step)), "moment": torch.arange(7) + step}


def is_right(checkpoint: Checkpoint | None) -> bool:
    """Whether a loaded checkpoint is, bit for bit, what the job saved at its step."""
    if checkpoint is None:
        return False
    expected = content(checkpoint.step)
    return checkpoint.state == {"position": checkpoint.step} and all(
        checkpoint.tensors[name].equal(expected[name]) for name in expected
    )


def save(url: str, step: int) -> None:
    save_checkpoint(url, Checkpoint(step, content(step), {"position": step}), FINGERPRINT, keep_last=1)


def cycle(url: str, notes: Path) -> None:
    """Load, then two saves with retention, then load again."""
    found = load_newest_checkpoint(url, FINGERPRINT)
    assert is_right(found)
    start = found.step if found else 0
    for step in (start + 1, start + 2):
        save(url, step)
        note(notes, step)
    assert is_right(load_newest_checkpoint(url, FINGERPRINT))


def endless(url: str, notes: Path) -> None:
    """Save in the background, as fast as it goes, until killed."""
    found = load_newest_checkpoint(url, FINGERPRINT)
    assert found is None or is_right(found)
    step = found.step if found else 0
    saver = CheckpointSaver(url, FINGERPRINT, keep_last=2, keep_every=10)
    while True:
        saver.save(Checkpoint(step + 1, content(step + 1), {"position": step + 1}))
        if step:
            note(notes, step)
        step += 1


def note(notes: Path, step: int) -> None:
    """Remember outside of the store that a save was reported as done."""
    with open(notes, "a") as file:
        file.write(f"{step}\n")


def last_note(notes: Path) -> int:
    """The newest step that was reported as saved."""
    lines = notes.read_text().split("\n")[:-1] if notes.exists() else []
    return int(lines[-1]) if lines else 0


def die_at_call(number: int, url: str, notes: Path) -> None:
    """Run the cycle and end the process, without any clean-up, at the storage call with this number.

    Calls are what Python asks of the operating system below `url`: open, mkdir, rename, link, remove, and every fsync.
    """
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(KILLED)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(EVENTS) and any(url in str(argument) for argument in arguments):
            count()

    sync = os.fsync

    def counted_sync(fd: Any) -> None:
        count()
        sync(fd)

    os.fsync = counted_sync
    sys.addaudithook(audit)
    cycle(url, notes)
    os._exit(0)


def start(function: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Start a job in a fresh process, forked from a server that has loaded the libraries and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.storage.jobs", "s3fs", "checkpoints.s3"])
    process = context.Process(target=_with_environment, args=(environment or {}, function, *arguments))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _with_environment(environment: dict[str, str], function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*arguments)
