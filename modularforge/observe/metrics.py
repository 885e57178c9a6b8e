"""All metrics with their units, and those of one job as curves: JSON lines in, steps and values per column out.

A metric is one entry in one of two tables: CURVES are what jobs log by step, MEASURED what an evaluation finds out, as
the task lists it.

Training and validation lines are interleaved and columns may be missing, so each column keeps its own steps. A torn
last line (the job is writing it, or was killed) is skipped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from modularforge.json_lines import MOST, moment, number_of, objects_in
from modularforge.tasks.task import SPEECH_METRICS, TEXT_METRICS
from modularforge.tasks.task import Metric as TaskMetric

MOST_STEPS = 2.0**53  # beyond, a float holds not every whole number
Floats = npt.NDArray[np.float64]
Scale = Literal["linear", "log", "from_zero"]


@dataclass(frozen=True)
class Metric:
    """How a column is shown: its unit, the factor from the stored to the shown unit, axis, and which way is better.

    `learns` marks what tells how well a job learns; the rest tells how it runs. `decides` marks the one by which models
    are ranked. Tables show it with so many decimals if they are told to; `logged` is the unit that is stored where that
    is not the shown one.
    """

    column: str
    title: str
    unit: str
    factor: float = 1.0
    scale: Scale = "linear"
    better: Literal["lower", "higher", "neither"] = "neither"
    learns: bool = False
    digits: int = 4
    decides: bool = False
    in_table: bool = True
    logged: str | None = None
    by_domain: bool = False

    @property
    def axis(self) -> str:
        """Title and unit, as an axis names them."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def written(self, value: Any) -> str:
        """A stored value as tables have it, in the shown unit."""
        return f"{float(value) * self.factor:.{self.digits}f}"


CURVES = (
    Metric("loss", "training loss", "nats per token", better="lower", learns=True),
    Metric("validation_loss", "validation loss", "nats per token", better="lower", learns=True),
    Metric("validation_perplexity", "validation perplexity", "", scale="log", better="lower", learns=True),
    Metric("learning_rate", "learning rate", "thousandths", 1e3, "from_zero", in_table=False, logged=""),
    Metric("gradient_norm", "gradient norm", "before clipping", scale="log", in_table=False),
    Metric("tokens_per_second", "speed", "1,000 tokens/s", 1e-3, "from_zero", "higher", logged="tokens per second"),
    Metric(
        "data_wait_share", "waiting for data", "% of the time", 100, "from_zero", "lower", logged="share of the time"
    ),
    Metric("peak_memory_bytes", "peak memory", "GiB", 2.0**-30, "from_zero", "lower", logged="bytes"),
    Metric("scale", "scale of steering", "mean over places", in_table=False),
    Metric("vector_norm", "length of steering vectors", "mean", in_table=False),
)
COLUMN_OF = {"loss": "mean_loss"}  # of results.json, where it is not the metric's own name


def _of_results(one: TaskMetric) -> Metric:
    unit = "" if one.unit == "bits" else one.unit
    return Metric(
        COLUMN_OF.get(one.name, one.name), one.title, unit, one.factor, better=one.better, learns=True,
        digits=one.digits, decides=one.decides, in_table=one.in_table, by_domain=one.by_domain,
    )  # fmt: skip


MEASURED = tuple(map(_of_results, TEXT_METRICS))
MEASURED_OF_SPEECH = tuple(map(_of_results, SPEECH_METRICS))
ERROR_RATES = tuple(one for one in MEASURED_OF_SPEECH if one.column not in {own.column for own in MEASURED})
"""What only rows of speech have."""
DECISIVE = next(metric for metric in MEASURED if metric.decides)


def is_speech(results: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of transcripts; what says nothing of its task is of text."""
    return results.get("task") == "speech"


def measured(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    """What an evaluation found out, as its task lists it."""
    return MEASURED_OF_SPEECH if is_speech(results) else MEASURED


def decisive(results: Mapping[str, Any]) -> Metric:
    """The one by which its models are ranked."""
    return next(metric for metric in MEASURED_OF_SPEECH if metric.decides) if is_speech(results) else DECISIVE


def of_domains(results: Mapping[str, Any]) -> Metric:
    """The one that tables and figures have by domain."""
    return next(metric for metric in measured(results) if metric.by_domain)


def standing(row: Mapping[str, Any], metric: Metric | None = None) -> float:
    """What a row is ranked by, the best one lowest: its value of the metric that decides."""
    metric = metric or DECISIVE
    value = float(row[metric.column])
    return -value if metric.better == "higher" else value


CURVE_OF_COLUMN = {metric.column: metric for metric in CURVES}
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
    rows, unreadable = _parse_lines(content)
    columns: dict[str, tuple[list[float], list[Any]]] = {}
    for row in rows:
        step = row["step"]
        for column, value in row.items():
            steps, found = columns.setdefault(column, ([], []))
            steps.append(step)
            found.append(value)
        if "loss" not in row:  # times are those of the training lines
            columns["time"][0].pop()
            columns["time"][1].pop()
    last_time = max((row["time"] for row in rows[-2:] if row["time"] is not None), default=None)
    curves = {column: _curve(*lists) for column, lists in columns.items() if column not in NOT_VALUES}
    times = _curve(*columns.get("time", ([], [])))
    return JobMetrics(
        name, {column: curve for column, curve in curves.items() if len(curve)}, times, last_time, unreadable
    )


def _parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Objects with a step and a time, and how many lines are none."""
    rows, unreadable = objects_in(content)
    kept = [row for row in rows if _is_step(row.get("step"))]
    return [{**row, "time": moment(row.get("time"))} for row in kept], unreadable + len(rows) - len(kept)


def _is_step(value: Any) -> bool:
    number = number_of(value)
    return number is not None and 0 <= number <= MOST_STEPS


def _curve(steps: list[float], values: list[Any]) -> Curve:
    """Points in the order of steps, without those whose value is no number."""
    if not set(map(type, values)) <= {float}:
        numbers = [number_of(value) for value in values]
        kept = [index for index, number in enumerate(numbers) if number is not None]
        steps, values = [steps[index] for index in kept], [numbers[index] for index in kept]
    steps_array, values_array = np.array(steps, dtype=float), np.array(values, dtype=float)
    values_array[np.abs(values_array) > MOST] *= math.inf
    if len(steps_array) > 1 and not (np.diff(steps_array) > 0).all():
        steps_array, last = np.unique(steps_array[::-1], return_index=True)
        values_array = values_array[::-1][last]
    return Curve(steps_array, values_array)
