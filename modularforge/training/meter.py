"""Losses, speed and memory of a training job, one JSON line per report, without making the device wait at each step."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modularforge.errors import TrainingError
from modularforge.log import MetricsLog
from modularforge.training.distributed import World
from modularforge.training.job import Job


class Meter:
    """Collects what happened since the last report; losses stay on the device until then."""

    def __init__(self, job: Job, world: World, step: int) -> None:
        self.job, self.world = job, world
        self._log = MetricsLog(job.metrics_url, job.tensorboard) if job.metrics_url and world.is_main else None
        if self._log:
            self._log.restart_after(step)
        self.tokens_per_second = 0.0
        self._all_tokens, self._all_seconds = 0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._values: list[Tensor] = []
        self._tokens, self._data_seconds, self._start = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent in the block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - start

    def count(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        """Remember one step's loss and gradient norm (still on the device) and its tokens over all ranks."""
        self._values.append(torch.stack([loss, norm]))
        self._tokens += tokens

    def report(self, step: int, rate: float) -> float:
        """Mean loss since the last report, after writing a line of metrics (called on every rank; rank 0 writes).

        Raises TrainingError when a loss or a gradient was not finite.
        """
        losses, norms = torch.stack(self._values).double().cpu().unbind(dim=1)
        loss_sum, norm_sum = self.world.total([float(losses.mean()), float(norms.sum())])
        self._check_finite(step, loss_sum + norm_sum)
        seconds = time.perf_counter() - self._start
        mean_loss = loss_sum / self.world.size
        self.tokens_per_second = self._tokens / seconds
        self._all_tokens, self._all_seconds = self._all_tokens + self._tokens, self._all_seconds + seconds
        self.write(
            step=step,
            tokens=step * self._tokens // len(self._values),
            loss=mean_loss,
            learning_rate=rate,
            gradient_norm=float(norms[-1]),
            tokens_per_second=round(self.tokens_per_second, 1),
            data_wait_share=round(self._data_seconds / seconds, 5),
            peak_memory_bytes=peak_memory_bytes(self.world.device),
        )
        self._restart()
        return mean_loss

    @property
    def mean_speed(self) -> float:
        """Tokens per second over all reports; 0 before the first."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0

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
        if self._log:
            self._log.flush()

    def close(self) -> None:
        """Let another process write this job's metrics."""
        if self._log:
            self._log.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the device's allocator on a GPU, of the process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
