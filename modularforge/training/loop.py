"""One loop for backbone, experts, baselines and calibration; it knows none of them.

`fit` trains a model on batches that restart from their state, so that a job killed anywhere continues from its newest
checkpoint with the same losses, bit for bit on a deterministic device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext

import torch
from torch import Tensor, nn

from checkpoints.screen import progress
from modularforge.config import TrainingConfig
from modularforge.errors import Interrupted
from modularforge.model.backbone import perplexity
from modularforge.training.distributed import World, parallelise
from modularforge.training.job import Job
from modularforge.training.keeper import Keeper
from modularforge.training.meter import Meter
from modularforge.training.optimizer import build_optimizer, learning_rate, trained_parameters
from modularforge.training.signals import StopFlag, stop_on_signals
from modularforge.training.state import Trainer
from modularforge.training.teller import Teller

Batch = tuple[Tensor, Tensor, int]
"""Inputs [B, T], targets [B, T] and the position after them, which restarts the stream there."""

LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]


def fit(
    model: nn.Module,
    loss_of: LossFunction,
    job: Job,
    batches_from: Callable[[int], Iterator[Batch]],
    validate: Callable[[], float],
    world: World,
) -> dict[str, float | None]:
    """Train `job.phase.steps` steps and return the final losses (called on every rank; rank 0 writes).

    `batches_from(position)` yields this rank's share of each global batch, `loss_of` the mean loss of a batch and
    `validate` the validation loss. Raises TrainingError on a non-finite loss and Interrupted after a stop signal, both
    before anything is saved as finished.
    """
    model.to(world.device)
    trainer = Trainer(model, build_optimizer(model, job.phase, job.training))
    keeper = Keeper(job, world)
    keeper.resume(trainer)
    wrapped = parallelise(model, world)
    if job.training.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    with closing(Meter(job, world, trainer.step)) as meter:
        batches = batches_from(trainer.position)
        showing = progress(job.name, job.phase.steps, start=trainer.step, is_wanted=world.is_main)
        with keeper, stop_on_signals() as stop, showing as bar:
            teller = Teller(job, bar, trainer.step, job.speaks and world.is_main)
            while trainer.step < job.phase.steps:
                rate = learning_rate(job.phase, trainer.step)
                with meter.waiting_for_data():
                    inputs_BT, targets_BT, trainer.position = next(batches)
                loss, norm = _step(trainer, wrapped, loss_of, inputs_BT, targets_BT, rate, job, world)
                trainer.step += 1
                meter.count(loss, norm, inputs_BT.numel() * world.size)
                stopping = keeper.agree_to_stop(bool(stop))
                saving = stopping or trainer.step % job.training.checkpoint_every == 0
                reporting = saving or _due(trainer.step, job.training.log_every, job)
                if reporting:
                    trainer.train_loss = meter.report(trainer.step, rate)
                if _due(trainer.step, job.training.validate_every, job):
                    trainer.validation_loss = _validated(model, validate, meter, trainer.step)
                if reporting:
                    teller.tell(trainer, rate, meter.tokens_per_second)
                if saving:
                    keeper.save(trainer)
                    meter.flush()
                if stopping:
                    keeper.wait()
                    raise Interrupted(_stop_message(trainer, job, stop))
                bar.advance(1)
        if trainer.validation_loss is None:
            trainer.validation_loss = _validated(model, validate, meter, trainer.step)
        meter.flush()
        teller.finish(trainer, meter.mean_speed)
    return {"train_loss": trainer.train_loss, "validation_loss": trainer.validation_loss}


def _step(
    trainer: Trainer,
    model: nn.Module,
    loss_of: LossFunction,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    rate: float,
    job: Job,
    world: World,
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the accumulated pieces of a batch; returns its loss and gradient norm on the device."""
    pieces = job.phase.accumulation_steps
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    model.train()
    total = torch.zeros((), device=world.device)
    for index, (inputs, targets) in enumerate(zip(inputs_BT.chunk(pieces), targets_BT.chunk(pieces), strict=True)):
        inputs = inputs.to(world.device, non_blocking=True)
        targets = targets.to(world.device, non_blocking=True)
        with _without_sync(model, index < pieces - 1), autocast(job.training, world.device):
            loss = loss_of(model, inputs, targets) / pieces
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(trained_parameters(trainer.model).values(), job.training.clip_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total, norm


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the settings and the device ask for it."""
    wanted = training.precision
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if wanted == "bf16" else nullcontext()


def _without_sync(model: nn.Module, active: bool) -> AbstractContextManager[object]:
    """DDP averages gradients only in the last piece of an accumulated batch."""
    if active and isinstance(model, nn.parallel.DistributedDataParallel):
        context: AbstractContextManager[object] = model.no_sync()
        return context
    return nullcontext()


def _due(step: int, every: int, job: Job) -> bool:
    return step % every == 0 or step == job.phase.steps


def _validated(model: nn.Module, validate: Callable[[], float], meter: Meter, step: int) -> float:
    """Validation loss, also written to the metrics; on the bare model, so it needs no collective of DDP."""
    model.eval()
    with torch.no_grad():
        loss = validate()
    meter.write(step=step, validation_loss=loss, validation_perplexity=perplexity(loss))
    return loss


def _stop_message(trainer: Trainer, job: Job, stop: StopFlag) -> str:
    return (
        f"{job.name} was stopped by {stop.signal_name or 'a signal to another rank'} at step {trainer.step} of "
        f"{job.phase.steps}; run the same command again to continue"
    )
