"""How far a training job is, from what lies in the store: newest checkpoint and last line of metrics."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from typing import Any

from checkpoints import find_artifact, paths
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
    last = _number(line.get("step"))
    return Progress(step, committed, int(last or 0), _number(line.get("loss")), _number(line.get("time")))


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
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and "loss" in line:
            return line
    return {}


def _number(value: Any) -> float | None:
    """A finite number; a line may be torn in odd places, and a diverged loss stands there as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST
    return float(value) if is_number else None
