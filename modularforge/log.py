"""What a run says: log lines for people, metrics as JSON lines for programs, progress on a terminal.

Metrics of a job go to one ``.jsonl`` file; on a folder each line is appended at once, on an object store the file is
replaced whole at every flush. A resumed job drops the lines after its checkpoint, so no step is told twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from checkpoints import StoreError, paths
from checkpoints.redact import redact_values
from checkpoints.retry import logger as store_logger
from checkpoints.screen import LogFormatter, step_bar
from modularforge.json_lines import number_of, object_in
from modularforge.tensorboard import events_beside

logger = logging.getLogger("modularforge")


def configure_logging(*, quiet: bool = False) -> None:
    """Send log lines, the store's too, to standard error, once a process; `quiet` (ranks but 0) keeps warnings only."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        store_logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def json_safe(value: Any) -> Any:
    """Replace non-finite floats by the strings "inf", "-inf" and "nan", which JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


class MetricsLog:
    """JSON lines of one job at `url`, and TensorBoard events beside them if asked for; use on rank 0 only."""

    def __init__(self, url: str, tensorboard: Literal["auto", "on", "off"] = "off") -> None:
        self.url = url
        self._lines: list[str] = []
        self._events = events_beside(url, tensorboard)

    def restart_after(self, step: int) -> None:
        """Keep the lines up to `step`: a job that resumes there will write the later ones again.

        On a folder, raises StoreError while another process writes the same job's metrics.
        """
        if paths.is_local(self.url):
            _claim(paths.local_path(self.url))
        try:
            found = paths.read_bytes(self.url).decode(errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            found = []
        self._lines = [line for line in found if _step_of(line) <= step]
        if found:
            self._replace()
        if self._events:
            self._events.restart(self._lines)

    def write(self, **values: Any) -> None:
        """Append one line."""
        line = json.dumps(json_safe(redact_values(values)), allow_nan=False)
        if paths.is_local(self.url):
            with paths.open_to_append(paths.local_path(self.url)) as file:
                file.write(f"{line}\n".encode())
        else:
            self._lines.append(line)
        if self._events:
            self._events.write(values)

    def flush(self) -> None:
        """Make all lines so far visible on an object store; a folder shows them at once."""
        if not paths.is_local(self.url) and self._lines:
            self._replace()
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Let another process write this job's lines."""
        if paths.is_local(self.url):
            _release(paths.local_path(self.url))

    def _replace(self) -> None:
        paths.replace_bytes(self.url, "".join(line + "\n" for line in self._lines).encode())


def _claim(path: Path) -> None:
    """Hold the lock of a job's metrics; without effect where the file system knows no locks."""
    lock = _lock_of(path)
    if lock in _LOCKS:
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise StoreError(
            f"{path} must have one writer, but another process is training {path.stem} in this run; "
            "wait for it or stop it, or use another --output-dir"
        ) from error
    except OSError as error:
        logger.debug("no lock on %s: %s", lock, error)
    _LOCKS[lock] = descriptor


def _release(path: Path) -> None:
    descriptor = _LOCKS.pop(_lock_of(path), None)
    if descriptor is not None:
        os.close(descriptor)  # which gives the lock up


def _lock_of(path: Path) -> Path:
    return path.absolute().with_name(f".{path.stem}.lock")


_LOCKS: dict[Path, int] = {}


def _step_of(line: str) -> float:
    """The step of a metrics line; a torn line (killed while writing) counts as later than all."""
    step = number_of(object_in(line).get("step"))
    return math.inf if step is None or math.isnan(step) else step


class Progress:
    """A bar on a terminal; silent elsewhere."""

    def __init__(self, bar: Callable[[float, str], None] | None = None) -> None:
        self._bar = bar

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal that shows it."""
        return self._bar is not None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move the bar on by `amount` units; `note`, or the one before it, is shown behind it."""
        if self._bar is not None:
            self._bar(amount, note)


@contextmanager
def progress(
    description: str, total: float | None, unit: str = "steps", start: int = 0, is_wanted: bool = True
) -> Iterator[Progress]:
    """Show a progress bar while the block runs, if it is wanted (by one rank of many) and standard error a terminal."""
    if not is_wanted or not sys.stderr.isatty():
        yield Progress()
        return
    with step_bar(description, total, unit, start) as advance:
        yield Progress(advance)
