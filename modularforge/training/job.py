"""What one training job is called, how long it trains, and where its traces go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modularforge.config import Config, PhaseConfig, TrainingConfig
from modularforge.pipeline import checkpoint_url, metrics_url
from modularforge.tasks.task import task_of


@dataclass(frozen=True)
class Job:
    """One training job; without URLs it leaves no checkpoints and no metrics."""

    name: str
    phase: PhaseConfig
    training: TrainingConfig
    fingerprint: str = ""
    checkpoint_url: str | None = None
    metrics_url: str | None = None
    tensorboard: Literal["auto", "on", "off"] = "off"
    speaks: bool = True
    """Whether its progress is told in the log; a check has words of its own."""
    unit: str = "tokens"
    """What the units of its batches are called in the metrics."""
    until: int | None = None
    """Steps after which it ends, where another job goes on with the phase."""

    @property
    def end(self) -> int:
        """Steps of the phase that are done when it ends."""
        return self.phase.steps if self.until is None else self.until

    @staticmethod
    def of_run(config: Config, name: str, phase: PhaseConfig, fingerprint: str, until: int | None = None) -> Job:
        """A job of a run, with its checkpoints and metrics in their places there."""
        places = checkpoint_url(config, name), metrics_url(config, name)
        unit = task_of(config).unit
        return Job(
            name, phase, config.training, fingerprint, *places, config.metrics.tensorboard, unit=unit, until=until
        )
