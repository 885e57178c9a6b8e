"""What one training job is called, how long it trains, and where its traces go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modularforge.config import Config, PhaseConfig, TrainingConfig
from modularforge.cost import training_flops_per_token
from modularforge.pipeline import JobName, checkpoint_url, metrics_url
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
    writers: tuple[str, ...] = ()
    """Tools that get its metrics too."""
    speaks: bool = True
    """Whether its progress is told in the log; a check has words of its own."""
    unit: str = "tokens"
    """What the units of its batches are called in the metrics."""
    flops_per_unit: float = 0.0
    """FLOPs of its training by unit, for people; 0 is not known."""
    tokens: int = 0
    """Of a piece of a batch, on all ranks together."""
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
        unit, flops = task_of(config).unit, training_flops_per_token(config, JobName.parse(name).stage)
        tokens = phase.batch_size // phase.accumulation_steps * config.model.context_length
        return Job(
            name,
            phase,
            config.training,
            fingerprint,
            *places,
            config.metrics.tensorboard,
            tuple(config.metrics.writers),
            unit=unit,
            flops_per_unit=flops,
            tokens=tokens,
            until=until,
        )
