"""What people see of a training: a note behind the bar on a terminal, lines in a log file, and a line at the end."""

from __future__ import annotations

import time

from checkpoints.screen import Progress
from modularforge.log import logger
from modularforge.training.job import Job
from modularforge.training.state import Trainer

# A job of many short steps must not fill its log: it has lines for programs in its metrics.
SECONDS_BETWEEN_LINES = 2.0


class Teller:
    """Tells how one start of a job gets on; `bar` shows it where it is a terminal's, else the log does."""

    def __init__(self, job: Job, bar: Progress, first_step: int, speaks: bool) -> None:
        self.job, self.bar, self.first_step, self.speaks = job, bar, first_step, speaks
        self._start = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES

    def tell(self, trainer: Trainer, rate: float, tokens_per_second: float) -> None:
        """Say where the job is, after a report of losses; in a log every two seconds at the most."""
        steps, now = self.job.phase.steps, time.monotonic()
        losses = [f"loss {trainer.train_loss:.3f}"] if trainer.train_loss is not None else []
        losses += [f"val {trainer.validation_loss:.3f}"] if trainer.validation_loss is not None else []
        left = (now - self._start) / max(1, trainer.step - self.first_step) * (steps - trainer.step)
        note = [*losses, f"{count(tokens_per_second)} tok/s", f"lr {rate:.1e}".replace("e-0", "e-")]
        self.bar.advance(0, "  ".join(note))
        if self.speaks and not self.bar.is_shown and trainer.step < steps and self._is_time(now):
            where = f"{self.job.name} {trainer.step}/{steps} ({100 * trainer.step / steps:.0f} %)"
            logger.info("%s", "  ".join([where, *note, f"{clock(left)} left"]))

    def finish(self, trainer: Trainer, tokens_per_second: float) -> None:
        """Say what the job has come to."""
        found = [f"{trainer.step} steps"]
        found += [f"loss {trainer.train_loss:.3f}"] if trainer.train_loss is not None else []
        found += [f"validation {trainer.validation_loss:.3f}"] if trainer.validation_loss is not None else []
        found += [f"{count(tokens_per_second)} tok/s"] if tokens_per_second else []
        if self.speaks:
            logger.info("%s done: %s, %s", self.job.name, ", ".join(found), clock(time.monotonic() - self._start))

    def _is_time(self, now: float) -> bool:
        is_time = now - self._last_line >= SECONDS_BETWEEN_LINES
        self._last_line = now if is_time else self._last_line
        return is_time


def clock(seconds: float) -> str:
    """Seconds as a clock shows them: `1:12`, `4:03:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(value: float) -> str:
    """A count in three characters or so: `850`, `3.6k`, `36k`, `1.2M`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}" if value < 10 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"
