"""TensorBoard event files beside the JSON lines, when tensorboard is installed: the same numbers as scalars.

Events go to `metrics/tensorboard/JOB/`. They are made from the JSON lines, which stay the record: a resumed job drops
the file and writes the kept lines into a new one, and an object store gets the whole file at every flush.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable
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
        from tensorboard.compat.proto import event_pb2  # noqa: F401
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
        self.url = ""
        self._records: list[bytes] = []

    def restart(self, lines: Iterable[str]) -> None:
        """Begin again with the events of these metrics lines; a new name tells a running TensorBoard to look again."""
        paths.remove(self.folder)
        self.url = paths.join(self.folder, f"events.out.tfevents.{time.time_ns()}")
        self._records = [_first_record(), *(_record(json.loads(line)) for line in lines)]
        paths.replace_bytes(self.url, b"".join(self._records))

    def write(self, values: dict[str, Any]) -> None:
        """Append one metrics line; on a folder it is visible at once, on an object store after `flush`."""
        if not self.url:
            self.restart(())
        if paths.is_local(self.url):
            # The folder may be missing: a rival job has begun it again.
            with paths.open_to_append(paths.local_path(self.url)) as file:
                file.write(_record(values))
        else:
            self._records.append(_record(values))

    def flush(self) -> None:
        """Make all events visible on an object store."""
        if self.url and not paths.is_local(self.url):
            paths.replace_bytes(self.url, b"".join(self._records))


def _first_record() -> bytes:
    """What every event file begins with."""
    from tensorboard.compat.proto.event_pb2 import Event

    return _framed(Event(file_version="brain.Event:2"))


def _record(values: dict[str, Any]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = {name: _number(value) for name, value in values.items() if name not in NOT_SCALARS}
    kept = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items() if value is not None]
    step = min(MOST_STEPS, max(0.0, float(values["step"])))  # a line may be of another program
    return _framed(Event(wall_time=_number(values.get("time")) or 0.0, step=int(step), summary=Summary(value=kept)))


def _number(value: Any) -> float | None:
    """A scalar; JSON holds those that are not finite as text."""
    if not isinstance(value, int | float) and value not in NOT_FINITE:
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _framed(event: Any) -> bytes:
    """Length and checksums around an event, as TensorFlow's record files have them."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
