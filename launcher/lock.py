"""Only one launcher submits for a run at a time; the lock of one that was killed is taken over."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoints import paths
from launcher.places import lock_url
from modularforge.config import Config
from modularforge.errors import UserError

STALE_SECONDS = 600.0


class BusyError(UserError):
    """Another launcher is submitting the same run."""


@contextmanager
def submission_lock(config: Config) -> Iterator[None]:
    """Hold the run's lock while the block runs; raises BusyError when a living launcher has it."""
    url = lock_url(config)
    mine = json.dumps(
        {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "token": os.urandom(8).hex()}
    ).encode()
    try:
        paths.create_bytes(url, mine)
    except FileExistsError:
        _take_over(url, mine)
    try:
        yield
    finally:
        paths.remove(url)


def _take_over(url: str, mine: bytes) -> None:
    try:
        holder = json.loads(paths.read_bytes(url))
    except FileNotFoundError:
        holder = None
    if holder and _is_alive(holder):
        raise BusyError(
            f"{url} must be free, but the launcher with process id {holder['pid']} on {holder['host']} is submitting "
            "this run; wait for it, or delete that file when it is gone"
        )
    paths.remove(url)
    try:
        paths.create_bytes(url, mine)
    except FileExistsError as error:
        raise BusyError(f"{url} must be free, but another launcher was faster; wait for it") from error


def _is_alive(holder: dict[str, object]) -> bool:
    """On this machine the process is looked for; elsewhere a lock counts for ten minutes."""
    if holder["host"] == socket.gethostname():
        return os.path.exists(f"/proc/{holder['pid']}")
    return time.time() - float(str(holder["time"])) < STALE_SECONDS
