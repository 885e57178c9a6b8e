"""What a training reports: losses, speed and memory as lines for programs, and for people a note and a line in the log.

Losses stay on the device until a report, so that it need not wait at each step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from checkpoints.screen import Progress, clock
from modularforge.cost import device_peak
from modularforge.errors import TrainingError
from modularforge.log import MetricsLog, logger
from modularforge.training.distributed import World
from modularforge.training.gradient_norms import NormLog
from modularforge.training.job import Job
from modularforge.training.optimizer import Trainer

# A job of many short steps must not fill its log: it has lines for programs in its metrics.
SECONDS_BETWEEN_LINES = 2.0
SPEEDS = {"tokens": "tok/s"}  # what people call units per second


class Meter:
    """Collects what happened since the last report; losses stay on the device until then."""

    def __init__(self, job: Job, world: World, step: int, norms: NormLog | None = None) -> None:
        self.job, self.world, self._norms = job, world, norms
        self._log = (
            MetricsLog(job.metrics_url, job.tensorboard, job.writers) if job.metrics_url and world.is_main else None
        )
        if self._log:
            self._log.restart_after(step)
        self.units_per_second = 0.0
        self._all_units, self._all_seconds = 0.0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._values: list[Tensor] = []
        self._units, self._data_seconds, self._start = 0.0, 0.0, time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in the block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - start

    def measure_gradients(self, step: int) -> None:
        """Measure the gradients that the step (1-based) is about to take, if the job wants that now."""
        if self._norms:
            self._norms.measure(step)

    def count(self, loss: Tensor, norm: Tensor, units: float) -> None:
        """Remember one step's loss and gradient norm (still on the device) and its units on this rank."""
        self._values.append(torch.stack([loss, norm]))
        self._units += units

    def report(self, step: int, rate: float, observed: Mapping[str, float]) -> float:
        """Mean loss since the last report, after writing a line of metrics (called on every rank; rank 0 writes).

        `observed` are further numbers, the same names on every rank; their means are written. Raises TrainingError when
        a loss or a gradient was not finite.
        """
        losses, norms = torch.stack(self._values).double().cpu().unbind(dim=1)
        sums = [float(losses.mean()), float(norms.sum()), self._units, *observed.values()]
        loss_sum, norm_sum, units, *further = self.world.total(sums)
        self._check_finite(step, loss_sum + norm_sum)
        seconds = time.perf_counter() - self._start
        mean_loss = loss_sum / self.world.size
        self.units_per_second = units / seconds
        self._all_units, self._all_seconds = self._all_units + units, self._all_seconds + seconds
        self.write(
            step=step,
            **{self.job.unit: int(step * units // len(self._values))},
            loss=mean_loss,
            learning_rate=rate,
            gradient_norm=float(norms[-1]),
            **{f"{self.job.unit}_per_second": round(self.units_per_second, 1)},
            data_wait_share=round(self._data_seconds / seconds, 5),
            peak_memory_bytes=peak_memory_bytes(self.world.device),
            **{name: value / self.world.size for name, value in zip(observed, further, strict=True)},
        )
        if self._norms:
            self._norms.write()
        self._restart()
        return mean_loss

    @property
    def mean_speed(self) -> float:
        """Units per second over all reports; 0 before the first."""
        return self._all_units / self._all_seconds if self._all_seconds else 0.0

    def _check_finite(self, step: int, value: float) -> None:
        if value != value or abs(value) == float("inf"):
            phase = self.job.phase
            raise TrainingError(
                f"{self.job.name} must have finite losses, but a loss or gradient at or before step {step} is not; "
                f"lower peak_learning_rate ({phase.peak_learning_rate:g}) or raise warmup_steps "
                f"({phase.warmup_steps}); nothing was saved after the last checkpoint"
            )

    def write(self, **values: object) -> None:
        """Write one line with the job's name and the time of day, on rank 0."""
        if self._log:
            self._log.write(job=self.job.name, time=round(time.time(), 3), **values)

    def flush(self) -> None:
        """Make the lines visible on an object store."""
        for log in (self._log, self._norms):
            if log:
                log.flush()

    def close(self) -> None:
        """Let another process write this job's metrics."""
        for log in (self._log, self._norms):
            if log:
                log.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the device's allocator on a GPU, of the process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Tells how one start of a job gets on; `bar` shows it where it is a terminal's, else the log does."""

    def __init__(self, job: Job, bar: Progress, first_step: int, speaks: bool, processes: int = 1) -> None:
        self.job, self.bar, self.first_step, self.speaks, self.processes = job, bar, first_step, speaks, processes
        self._speed = SPEEDS.get(job.unit, f"{job.unit}/s")
        self._start = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES

    def report(self, trainer: Trainer, rate: float, units_per_second: float) -> None:
        """Say where the job is, after a report of losses; in a log every two seconds at the most."""
        steps, now = self.job.end, time.monotonic()
        losses = [f"loss {trainer.train_loss:.3f}"] if trainer.train_loss is not None else []
        losses += [f"val {trainer.validation_loss:.3f}"] if trainer.validation_loss is not None else []
        left = (now - self._start) / max(1, trainer.step - self.first_step) * (steps - trainer.step)
        note = [*losses, *self._speeds(units_per_second), f"lr {rate:.1e}".replace("e-0", "e-")]
        self.bar.advance(0, "  ".join(note))
        if self.speaks and not self.bar.is_shown and trainer.step < steps and self._is_time(now):
            where = f"{self.job.name} {trainer.step}/{steps} ({100 * trainer.step / steps:.0f} %)"
            logger.info("%s", "  ".join([where, *note, f"{clock(left)} left"]))

    def finish(self, trainer: Trainer, units_per_second: float) -> None:
        """Say what the job has come to."""
        found = [f"{trainer.step} steps"]
        found += [f"loss {trainer.train_loss:.3f}"] if trainer.train_loss is not None else []
        found += [f"validation {trainer.validation_loss:.3f}"] if trainer.validation_loss is not None else []
        found += self._speeds(units_per_second) if units_per_second else []
        if self.speaks:
            logger.info("%s done: %s, %s", self.job.name, ", ".join(found), clock(time.monotonic() - self._start))

    def _speeds(self, units_per_second: float) -> list[str]:
        """How fast it is, and beside what the devices can do (MFU, arXiv 2204.02311, appendix B)."""
        speed = [f"{count(units_per_second)} {self._speed}"]
        if not self.job.flops_per_unit or not self.speaks:
            return speed
        share = device_peak().share(units_per_second * self.job.flops_per_unit / self.processes)
        return [*speed, f"{100 * share:.{0 if share >= 0.1 else 1}f} % of peak"]

    def _is_time(self, now: float) -> bool:
        is_time = now - self._last_line >= SECONDS_BETWEEN_LINES
        self._last_line = now if is_time else self._last_line
        return is_time


def count(value: float) -> str:
    """A count in three characters or so: `0.3`, `850`, `3.6k`, `36k`, `1.2M`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"
