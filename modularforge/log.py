"""What a run says: log lines for people, metrics as JSON lines for programs.

Metrics of a job go to one ``.jsonl`` file; on a folder each line is appended at once, on an object store the file is
replaced whole at every flush. A resumed job drops the lines after its checkpoint, so no step is told twice.

TensorBoard events, where tensorboard is installed, go to `metrics/tensorboard/JOB/`: the same numbers as scalars, made
from the JSON lines, which stay the record. A resumed job drops the file and writes the kept lines into a new one. Other
tools are told the same numbers by `metric_writers.py`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from checkpoints import StoreError, paths
from checkpoints.redact import redact_values
from checkpoints.retry import logger as store_logger
from checkpoints.screen import log_to_screen
from modularforge.errors import ConfigError
from modularforge.json_lines import moment, number_of, object_in
from modularforge.metric_writers import scalars, step_of, writers_of

logger = logging.getLogger("modularforge")
Mode = Literal["auto", "on", "off"]
FOLDER = "tensorboard"
LOCK_SECONDS = 10.0  # a killed process keeps its locks until its memory is given back: seconds where it held much
POLL_SECONDS = 0.1


def configure_logging(*, quiet: bool = False) -> None:
    """Send log lines, the store's too, to standard error, once a process; `quiet` (ranks but 0) keeps warnings only."""
    if not logger.handlers:
        log_to_screen(logger, store_logger)
        logger.propagate = False
    for one in (logger, store_logger):
        one.setLevel(logging.WARNING if quiet else logging.INFO)


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
    """JSON lines of one job at `url`, and what else is told of them (`metrics`); use on rank 0 only."""

    def __init__(self, url: str, tensorboard: Mode = "off", writers: Iterable[str] = ()) -> None:
        self.url = url
        self._lines: list[str] = []
        events = events_beside(url, "on" if "tensorboard" in writers else tensorboard)
        others = [name for name in writers if name != "tensorboard"]
        self._writers = [*([events] if events else []), *writers_of(url, others, logger.warning)]

    def restart_after(self, step: int) -> None:
        """Keep the lines up to `step`: a job that resumes there will write the later ones again.

        On a folder, raises StoreError when another process writes the same job's metrics and does not end soon.
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
        for writer in self._writers:
            writer.restart(self._lines)

    def write(self, **values: Any) -> None:
        """Append one line."""
        line = json.dumps(json_safe(redact_values(values)), allow_nan=False)
        if paths.is_local(self.url):
            with paths.open_to_append(paths.local_path(self.url)) as file:
                file.write(f"{line}\n".encode())
        else:
            self._lines.append(line)
        for writer in self._writers:
            writer.write(values)

    def flush(self) -> None:
        """Make all lines so far visible on an object store; a folder shows them at once."""
        if not paths.is_local(self.url) and self._lines:
            self._replace()
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Let another process write this job's lines."""
        for writer in self._writers:
            writer.close()
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
        _lock_soon(descriptor, path)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise StoreError(
            f"{path} must have one writer, but another process is training {path.stem} in this run; "
            "wait for it or stop it, or use another --output-dir"
        ) from error
    except OSError as error:
        logger.debug("no lock on %s: %s", lock, error)
    _LOCKS[lock] = descriptor


def _lock_soon(descriptor: int, path: Path) -> None:
    """Lock the file; a job that starts again at once after its killed predecessor waits until that is gone."""
    end, is_told = time.monotonic() + LOCK_SECONDS, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                raise
            if not is_told:
                is_told = True
                logger.info("another process still holds %s; waiting %.0f s for its end", path.name, LOCK_SECONDS)
        time.sleep(POLL_SECONDS)


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


def events_beside(metrics_url: str, mode: Mode) -> EventFile | None:
    """The event file of a metrics file; None when it is off, or `auto` and tensorboard is not installed."""
    if mode == "off":
        return None
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        if mode == "on":
            raise ConfigError(
                "metrics.tensorboard must not be on without tensorboard, but it is not installed; "
                "run `pip install tensorboard`, or set it to auto"
            ) from error
        return None
    folder, name = metrics_url.rsplit("/", 1)
    return EventFile(paths.join(folder, FOLDER, name.removesuffix(".jsonl")))


class EventFile:
    """TensorBoard events of one job in a folder of their own; use on rank 0 only."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._writer: Any = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def restart(self, lines: Iterable[str]) -> None:
        """Begin again with the events of these metrics lines; a new name tells a running TensorBoard to look again."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer:
            self._writer.close()
        paths.remove(self.folder)
        if not paths.is_local(self.folder):
            self._scratch = tempfile.TemporaryDirectory(prefix="modularforge-events-", ignore_cleanup_errors=True)
        self._writer = SummaryWriter(str(self._local))
        for line in lines:
            self._add(json.loads(line))
        self._writer.flush()

    def write(self, values: dict[str, Any]) -> None:
        """Append one metrics line; on a folder it is visible at once, on an object store after `flush`."""
        if not self._writer:
            self.restart(())
        self._local.mkdir(parents=True, exist_ok=True)  # it is gone where another process has begun this job again
        self._add(values)
        self._writer.flush()

    def flush(self) -> None:
        """Make all events visible on an object store."""
        for file in self._local.iterdir() if self._scratch else ():
            paths.replace_bytes(paths.join(self.folder, file.name), file.read_bytes())

    def close(self) -> None:
        """Every line is in its file already."""

    @property
    def _local(self) -> Path:
        """Where TensorBoard's writer writes: it knows folders alone."""
        return Path(self._scratch.name) if self._scratch else paths.local_path(self.folder)

    def _add(self, values: dict[str, Any]) -> None:
        for name, number in scalars(values).items():
            self._writer.add_scalar(name, number, step_of(values), walltime=moment(values.get("time")) or 0.0)
