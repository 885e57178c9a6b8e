"""Only one launcher submits for a run, or runs it here, at a time; the lock of one that was killed is taken over."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints import paths
from checkpoints.parsing import parse_object
from launcher.events import number_in
from launcher.layout import lock_url
from modularforge.config import Config
from modularforge.errors import UserError
from modularforge.log import logger

STALE_SECONDS = 600.0  # after its last sign of life, the lock of a launcher on another machine counts no longer
BEAT_SECONDS = 60.0
SETTLE_SECONDS = 1.0  # longer than another needs between reading a dead launcher's lock and putting its own there


class BusyError(UserError):
    """Another launcher is submitting the same run."""


@contextmanager
def submission_lock(config: Config) -> Iterator[None]:
    """Hold the run's lock while the block runs; raises BusyError when a living launcher has it."""
    url, token = lock_url(config), os.urandom(8).hex()
    try:
        paths.create_bytes(url, _mark(token))
    except FileExistsError:
        _take_over(url, token)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(url, token, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        if read_holder(url).get("token") == token:
            paths.remove(url)


def read_holder(url: str) -> dict[str, object]:
    """What the lock says; nothing where there is none, or none that can be read."""
    try:
        return dict(parse_object(paths.read_bytes(url)))
    except (FileNotFoundError, ValueError):
        return {}


def is_alive(holder: dict[str, object]) -> bool:
    """Whether there is a holder, and it lives: here its process is looked for; elsewhere it must not be silent long.

    Ids of processes are given again, after a restart of the machine soon: the command must be the holder's too.
    """
    if holder.get("host") == socket.gethostname():
        return isinstance(pid := holder.get("pid"), int) and _exists(pid) and _may_run(pid, holder.get("command"))
    return time.time() - (number_in(holder, "time") or 0) < STALE_SECONDS


def _exists(pid: int) -> bool:
    """Whether there is such a process, whoever's it is."""
    if pid < 1:  # which would mean groups of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _may_run(pid: int, digest: object) -> bool:
    """Whether a process may be of the command with this digest; None, as earlier versions left it, is any."""
    command = command_of(pid)
    return command is None or digest in (None, _digest(command))


def command_of(pid: int) -> str | None:
    """The command line of a process; None when it cannot be read, as where a machine hides those of other users."""
    listed = Path("/proc")
    try:
        if listed.is_dir():  # not on macOS
            return (listed / str(pid) / "cmdline").read_text(errors="replace")
        return subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout
    except OSError:
        return None


def _digest(command: str) -> str:
    """A command as the lock has it: others may read the lock, and a command may hold a password."""
    return hashlib.sha256(command.encode()).hexdigest()[:16]


def _mark(token: str) -> bytes:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "command": _digest(command_of(os.getpid()) or "")}
    return json.dumps({**holder, "time": time.time(), "token": token}).encode()


def _beat(url: str, token: str, ended: threading.Event) -> None:
    """Renew the time in the lock now and then, so that other machines see that its holder lives."""
    while not ended.wait(BEAT_SECONDS):
        try:
            if read_holder(url).get("token") == token:
                paths.replace_bytes(url, _mark(token))
        except OSError as error:
            logger.warning("%s could not be renewed, tried again in %.0f s: %s", url, BEAT_SECONDS, error)


def _take_over(url: str, token: str) -> None:
    """Put the own lock in the place of a dead launcher's, unless another process does so at the same time."""
    holder = read_holder(url)
    if is_alive(holder):
        raise BusyError(
            f"{url} must be free, but the launcher with process id {holder.get('pid')!r:.20} on "
            f"{str(holder.get('host'))!r:.80} is "
            "submitting this run; wait for it, or delete that file when it is gone"
        )
    try:
        paths.remove(url)
        paths.create_bytes(url, _mark(token))
        time.sleep(SETTLE_SECONDS)  # another process that saw the same dead holder may remove our lock for it
        taken = read_holder(url).get("token") == token
    except FileExistsError:
        taken = False
    if not taken:
        raise BusyError(f"{url} must be free, but another launcher was faster; wait for it")
