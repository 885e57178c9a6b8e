"""How far a training job is, from what lies in the store: newest checkpoint and last line of metrics."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

from checkpoints import find_artifact, paths
from checkpoints.parsing import parse_object
from modularforge.config import Config
from modularforge.pipeline import checkpoint_url, metrics_url

STEP_NAME = re.compile(r"step-(\d{8,})")
TAIL_BYTES = 8192
MOST = 2.0**53


@dataclass(frozen=True)
class Progress:
    """Step of the newest checkpoint and when it was committed; last step, loss and time in the metrics."""

    checkpoint_step: int = 0
    checkpoint_time: float | None = None
    step: int = 0
    loss: float | None = None
    time: float | None = None


def progress_of(config: Config, job: str) -> Progress:
    """What the store says of one job."""
    line = _last_line(metrics_url(config, job))
    step, committed = newest_checkpoint(config, job)
    loss, seconds = (number_in(line, name) for name in ("loss", "time"))
    return Progress(step, committed, int(number_in(line, "step") or 0), loss, seconds)


def newest_checkpoint(config: Config, job: str) -> tuple[int, float | None]:
    """Step and time of the newest committed checkpoint; 0 when there is none."""
    url = checkpoint_url(config, job)
    for name in sorted(filter(STEP_NAME.fullmatch, paths.list_folder(url)), reverse=True):
        if artifact := find_artifact(paths.join(url, name)):
            created = datetime.datetime.fromisoformat(artifact.manifest.created).timestamp()
            return int(name.removeprefix("step-")), created
    return 0, None


def _last_line(url: str) -> dict[str, Any]:
    """The last metrics line that has a loss; an empty one when there is none."""
    try:
        size = paths.file_size(url)
        content = paths.read_bytes(url, max(0, size - TAIL_BYTES), size)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for text in reversed(content.decode(errors="replace").splitlines()):
        if "loss" in (line := metrics_line(text)):
            return line
    return {}


def metrics_line(text: str) -> dict[str, Any]:
    """The values of a line of metrics; none of one that is torn."""
    try:
        return parse_object(text)
    except ValueError:
        return {}


def number_in(line: dict[str, Any], name: str) -> float | None:
    """A value of a line of metrics, if it is there and a number."""
    value = line.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 else None
