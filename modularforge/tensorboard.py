"""TensorBoard event files beside the JSON lines, when tensorboard is installed: the same numbers as scalars.

Events go to `metrics/tensorboard/JOB/`. They are made from the JSON lines, which stay the record: a resumed job drops
the file and writes the kept lines into a new one, and an object store gets the whole file at every flush.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from checkpoints import paths
from modularforge.errors import ConfigError

Mode = Literal["auto", "on", "off"]
FOLDER = "tensorboard"
NOT_FINITE = ("inf", "-inf", "nan")
MOST_STEPS = 2.0**53
NOT_SCALARS = ("job", "step", "time")


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

    @property
    def _local(self) -> Path:
        """Where TensorBoard's writer writes: it knows folders alone."""
        return Path(self._scratch.name) if self._scratch else paths.local_path(self.folder)

    def _add(self, values: dict[str, Any]) -> None:
        step = int(min(MOST_STEPS, max(0.0, float(values["step"]))))  # a line may be of another program
        for name, value in values.items():
            if name not in NOT_SCALARS and (number := _number(value)) is not None:
                self._writer.add_scalar(name, number, step, walltime=_number(values.get("time")) or 0.0)


def _number(value: Any) -> float | None:
    """A scalar; JSON holds those that are not finite as text."""
    if not isinstance(value, int | float) and value not in NOT_FINITE:
        return None
    try:
        return float(value)
    except OverflowError:
        return None
