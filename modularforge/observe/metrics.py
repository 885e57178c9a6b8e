"""Metrics of one job as curves: JSON lines in, one array of steps and one of values per column out.

Training and validation lines are interleaved and columns may be missing, so each column keeps its own steps. A torn
last line (the job is writing it, or was killed) is skipped and counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scale = Literal["linear", "log", "from_zero"]


@dataclass(frozen=True)
class Metric:
    """How a column is shown: its unit, the factor from the stored to the shown unit, axis, and which way is better."""

    column: str
    title: str
    unit: str
    factor: float = 1.0
    scale: Scale = "linear"
    better: Literal["lower", "higher", "neither"] = "neither"

    @property
    def axis(self) -> str:
        """Title and unit, as an axis names them."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


METRICS = (
    Metric("loss", "training loss", "nats per token", better="lower"),
    Metric("validation_loss", "validation loss", "nats per token", better="lower"),
    Metric("validation_perplexity", "validation perplexity", "", scale="log", better="lower"),
    Metric("learning_rate", "learning rate", "thousandths", 1e3, "from_zero"),
    Metric("gradient_norm", "gradient norm", "before clipping", scale="log"),
    Metric("tokens_per_second", "speed", "thousand tokens per second", 1e-3, "from_zero", "higher"),
    Metric("data_wait_share", "waiting for data", "% of the time", 100.0, "from_zero", "lower"),
    Metric("peak_memory_bytes", "peak memory", "GiB", 2.0**-30, "from_zero", "lower"),
)
NOT_VALUES = frozenset({"job", "step", "time"})


@dataclass(frozen=True)
class Curve:
    """Values by step; steps rise."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Curve:
        """The points whose value is a finite number."""
        kept = np.isfinite(self.values)
        return self if kept.all() else Curve(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class JobMetrics:
    """All curves of one job; `times` holds the seconds since 1970 of its training lines."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    times: Curve = field(default_factory=lambda: Curve(np.empty(0), np.empty(0)))
    last_time: float | None = None
    unreadable_lines: int = 0

    @property
    def last_step(self) -> int:
        """The last step that any line tells of; 0 without lines."""
        return int(max((curve.steps[-1] for curve in self.curves.values() if len(curve)), default=0))


def parse_metrics(name: str, content: bytes) -> JobMetrics:
    """Curves of a metrics file; when a step is told twice, the later line counts."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    unreadable, last_time = 0, None
    for line in content.splitlines():
        values = _parse_line(line)
        if values is None:
            unreadable += bool(line.strip())
            continue
        step = values["step"]
        last_time = values.get("time", last_time)
        for column, value in values.items():
            if column not in NOT_VALUES:
                steps, found = columns.setdefault(column, ([], []))
                steps.append(step)
                found.append(value)
        if "loss" in values and "time" in values:
            steps, found = columns.setdefault("time", ([], []))
            steps.append(step)
            found.append(values["time"])
    curves = {column: _curve(*lists) for column, lists in columns.items()}
    times = curves.pop("time", Curve(np.empty(0), np.empty(0)))
    return JobMetrics(name, curves, times, last_time, unreadable)


def _parse_line(line: bytes) -> dict[str, float] | None:
    """The numbers of one line; None when it is no JSON object with a step."""
    try:
        values: dict[str, Any] = json.loads(line)
        step = float(values["step"])
    except (ValueError, KeyError, TypeError):
        return None
    numbers = {column: _number(value) for column, value in values.items() if column != "job"}
    return {**{column: value for column, value in numbers.items() if value is not None}, "step": step}


def _number(value: Any) -> float | None:
    """A float; the log writes non-finite ones as the strings "nan", "inf" and "-inf"."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _curve(steps: list[float], values: list[float]) -> Curve:
    steps_array, values_array = np.array(steps), np.array(values)
    if len(steps) > 1 and not (np.diff(steps_array) > 0).all():
        steps_array, last = np.unique(steps_array[::-1], return_index=True)
        values_array = values_array[::-1][last]
    return Curve(steps_array, values_array)
