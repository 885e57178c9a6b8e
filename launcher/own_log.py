"""The log of a job as its own program knows it: where it lies, and its end beside a run on an object storage.

Whoever reaches the run alone, from another machine, sees the last lines there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoints import StoreError, paths
from checkpoints.redact import redact
from launcher.layout import stored_log_url
from modularforge.config import Config

TAIL_BYTES, TAIL_SECONDS = 65_536, 60.0


def own_log() -> str:
    """The file that this program's words go to, which Slurm or the launcher chose; empty where it is no file."""
    try:
        path = os.readlink("/proc/self/fd/1")
    except OSError:
        return ""
    return path if Path(path).is_file() else ""


@contextmanager
def tail_beside_run(config: Config, job: str) -> Iterator[None]:
    """While the block runs, and at its end, keep the end of this program's log beside a run that is not on a disk."""
    log = own_log()
    if paths.is_local(config.output_dir) or not log:
        yield
        return
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(Path(log), stored_log_url(config, job), ended), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def _keep(log: Path, url: str, ended: threading.Event) -> None:
    before, is_last = b"", False
    while not is_last:
        is_last = ended.wait(TAIL_SECONDS)
        with suppress(OSError, StoreError):  # a log is no reason to end a training
            text = last_bytes(log)
            if text != before:
                paths.replace_bytes(url, redact(text.decode(errors="replace")).encode())
                before = text


def last_bytes(log: Path) -> bytes:
    """The end of a file, from the beginning of a line."""
    with open(log, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - TAIL_BYTES))
        text = file.read()
    return text if length <= TAIL_BYTES else text.partition(b"\n")[2]
