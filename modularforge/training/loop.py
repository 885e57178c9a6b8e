"""One loop for backbone, experts, baselines and calibration; it knows no kind of expert and no task.

`fit` trains what a `Trainable` names on batches that restart from their position, so that a job killed anywhere
continues from its newest checkpoint with the same losses, bit for bit on a deterministic device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext

import torch
from torch import Tensor, nn

from checkpoints.screen import progress
from modularforge.config import TrainingConfig
from modularforge.errors import Interrupted, TrainingError
from modularforge.experts.trainable import Trainable
from modularforge.model.backbone import perplexity
from modularforge.tasks.task import Batch, Examples
from modularforge.training.checkpointing import Checkpointing, StopFlag, stop_on_signals
from modularforge.training.distributed import World, parallelise
from modularforge.training.gradient_norms import norm_log
from modularforge.training.job import Job
from modularforge.training.meter import Meter, Reporter
from modularforge.training.optimizer import Trainer, build_optimizer, learning_rate, set_rate


def fit(
    trainable: Trainable,
    examples: Examples,
    job: Job,
    validate: Callable[[], float],
    world: World,
) -> dict[str, float | None]:
    """Train `job.phase.steps` steps and return the final losses (called on every rank; rank 0 writes).

    With `training.patience` the model ends with the weights of its best validation, perhaps after fewer steps; then
    `steps` and `best_step` are returned too.

    `validate` gives the validation loss, which is that of the job's own model. Raises TrainingError on a non-finite
    loss and Interrupted after a stop signal, both before anything is saved as finished.
    """
    trainable.model.to(world.device)
    trainer = Trainer(trainable, build_optimizer(trainable.groups, job.phase, job.training))
    checkpoints, patience = Checkpointing(job, world), job.training.patience
    if patience:
        trainer.keep_best()
    checkpoints.resume(trainer)
    norms = norm_log(job, trainable, world, trainer.step)
    with closing(_Wrapped(trainable, job, world)) as wrapped, closing(Meter(job, world, trainer.step, norms)) as meter:
        batches = examples.batches(trainer.position, world.rank, world.size)
        showing = progress(job.name, job.phase.steps, start=trainer.step, is_wanted=world.is_main)
        with checkpoints, stop_on_signals() as stop, showing as bar:
            reporter = Reporter(job, bar, trainer.step, job.speaks and world.is_main)
            while not trainer.is_over(job.phase.steps, patience):
                rate = learning_rate(job.phase, trainer.step)
                with meter.waiting_for_data():
                    batch = next(batches)
                trainable.before_step(trainer.step)
                loss, norm = _step(trainer, wrapped.model(), batch, rate, job, world, meter)
                trainer.step, trainer.position = trainer.step + 1, batch.position
                meter.count(loss, norm, batch.units)
                stopping = checkpoints.agree_to_stop(bool(stop))
                saving = stopping or trainer.step % job.training.checkpoint_every == 0
                # Whatever is saved, or may be the best, was reported just before, and so found finite.
                validating = _due(trainer.step, job.training.validate_every, job)
                reporting = saving or (patience and validating) or _due(trainer.step, job.training.log_every, job)
                if reporting:
                    trainer.train_loss = meter.report(trainer.step, rate, trainable.observations())
                if validating:
                    trainer.validation_loss = _validated(trainable.model, validate, meter, trainer.step)
                    if trainer.best:
                        trainer.best.see(trainer.validation_loss, trainer.step, trainable.parameters)
                if reporting:
                    reporter.report(trainer, rate, meter.units_per_second)
                if saving:
                    checkpoints.save(trainer)
                    meter.flush()
                if stopping:
                    checkpoints.wait()
                    raise Interrupted(_stop_message(trainer, job, stop))
                bar.advance(1)
        if trainer.validation_loss is None:
            trainer.validation_loss = _validated(trainable.model, validate, meter, trainer.step)
        ended = _with_best(trainer)
        meter.flush()
        reporter.finish(trainer, meter.mean_speed)
    return {"train_loss": trainer.train_loss, "validation_loss": trainer.validation_loss, **ended}


def _with_best(trainer: Trainer) -> dict[str, float]:
    """Give the model the best weights that were kept; returns when training ended and when they were had."""
    best = trainer.best
    if best is None or not best.step:
        return {}
    best.put_back(trainer.trainable.parameters)
    trainer.validation_loss = best.loss
    return {"steps": trainer.step, "best_step": best.step}


class _Wrapped:
    """The model as the ranks train it together: wrapped anew when other parameters learn, as phases may want.

    DDP waits for the gradients of all parameters that required one when it was made.
    """

    def __init__(self, trainable: Trainable, job: Job, world: World) -> None:
        self.trainable, self.compiles, self.world = trainable, job.training.compile, world
        self._parameters = list(trainable.parameters.values())
        self._learning: list[bool] = []
        self._model: nn.Module | None = None

    def model(self) -> nn.Module:
        """The wrapped model for the parameters that learn now (called on every rank)."""
        learning = [weight.requires_grad for weight in self._parameters]
        if self._model is None or learning != self._learning:
            self._learning, self._model = learning, None  # the old one lets go of its hooks first
            wrapped = parallelise(self.trainable.model, self.world, self.trainable.may_skip_parameters)
            self._model = torch.compile(wrapped) if self.compiles else wrapped  # type: ignore[assignment]
        assert self._model is not None
        return self._model

    def close(self) -> None:
        """Let go of DDP while the process group is still there.

        Held beyond it, as by the frames of an exception, DDP is the last to free the group: it then waits for gloo's
        threads while it holds Python's lock, for which they wait. Three of 18 jobs of two ranks, stopped, never ended.
        """
        self._model = None


def _step(
    trainer: Trainer, model: nn.Module, batch: Batch, rate: float, job: Job, world: World, meter: Meter
) -> tuple[Tensor, Tensor]:
    """One optimizer step over the accumulated pieces of a batch; returns its loss and gradient norm on the device."""
    count = job.phase.accumulation_steps
    set_rate(trainer.optimizer, rate)
    model.train()
    total = torch.zeros((), device=world.device)
    for index, piece in enumerate(_pieces(batch.tensors, count)):
        tensors = {name: tensor.to(world.device, non_blocking=True) for name, tensor in piece.items()}
        with _without_sync(model, index < count - 1), autocast(job.training, world.device):
            loss = trainer.trainable.loss(model, tensors) / count
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    meter.measure_gradients(trainer.step + 1)
    norm = _clipped(trainer.trainable, job.training.clip_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total, norm


def _clipped(trainable: Trainable, most: float) -> Tensor:
    """Scale gradients down, those of groups with a limit of their own first; returns the norm before the last limit."""
    for group in trainable.groups:
        if group.clip_norm is not None:
            nn.utils.clip_grad_norm_(group.parameters.values(), group.clip_norm)
    return nn.utils.clip_grad_norm_(trainable.parameters.values(), most)


def _pieces(tensors: Mapping[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """The batch in `count` pieces along its first axis; raises TrainingError when they would not be alike.

    Fewer pieces than `count` would never reach the one in which ranks exchange their gradients, and larger ones would
    weigh as much as smaller ones.
    """
    share = len(next(iter(tensors.values())))
    if share % count:
        raise TrainingError(
            f"accumulation_steps must divide the {share} sequences of a step that each process has, but is {count}; "
            "change it, batch_size, or the number of processes"
        )
    chunks = {name: tensor.chunk(count) for name, tensor in tensors.items()}
    return (dict(zip(chunks, piece, strict=True)) for piece in zip(*chunks.values(), strict=True))


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
