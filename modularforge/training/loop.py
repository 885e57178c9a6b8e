"""One loop for backbone, experts, baselines and calibration; it knows no kind of expert and no task.

`fit` trains what a `Trainable` names on batches that restart from their position, so that a job killed anywhere
continues from its newest checkpoint with the same losses, bit for bit on a deterministic device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext

import torch
from torch import Tensor, nn

from checkpoints.screen import progress
from checkpoints.training import Checkpoint
from modularforge.errors import Interrupted, TrainingError
from modularforge.experts.trainable import Trainable
from modularforge.model.backbone import perplexity
from modularforge.tasks.task import Batch, Examples
from modularforge.training.ahead import built_ahead
from modularforge.training.checkpointing import Checkpointing, StopFlag, checkpoint_of, stop_on_signals
from modularforge.training.compiled import compiled, compiled_blocks, is_compiled
from modularforge.training.distributed import World, parallelise
from modularforge.training.gradient_norms import norm_log
from modularforge.training.job import Job
from modularforge.training.meter import Meter, Reporter
from modularforge.training.optimizer import Trainer, build_optimizer, learning_rate, set_rate
from modularforge.training.precision import autocast, measuring
from modularforge.training.recompute import choose_recompute
from modularforge.training.sharding import (
    exchange_gradients,
    forget_unvisited,
    is_in_pieces,
    mask_gradients,
    part_of,
    shard,
    whole_norm,
)


def fit(
    trainable: Trainable,
    examples: Examples,
    job: Job,
    validate: Callable[[], float],
    world: World,
) -> dict[str, float | None]:
    """Train up to `job.end` steps and return the final losses (called on every rank; rank 0 writes).

    With them come the processor seconds of this process, since it began or went on. With `training.patience` the model
    ends with the weights of its best validation, perhaps after fewer steps; then `steps` and `best_step` come too.

    `validate` gives the validation loss, which is that of the job's own model. Raises TrainingError on a non-finite
    loss and Interrupted after a stop signal, both before anything is saved as finished.
    """
    return fit_from(trainable, examples, job, validate, world)[0]


def fit_from(
    trainable: Trainable,
    examples: Examples,
    job: Job,
    validate: Callable[[], float],
    world: World,
    start: Checkpoint | None = None,
) -> tuple[dict[str, float | None], Checkpoint]:
    """The same from the state that another job left after fewer steps, whole; returns the state of this one too.

    Of a model in pieces its tensors lie in pieces as well.
    """
    begun = time.process_time()
    trainable = shard(trainable, job.training, world)
    trainable.model.to(world.device)
    choose_recompute(trainable, job, world)
    trainer = Trainer(trainable, build_optimizer(trainable.groups, job.phase, job.training))
    if patience := job.training.patience:
        trainer.keep_best()
    checkpoints = Checkpointing(job, world, part_of(trainer, job.training, world))
    checkpoints.resume(trainer, start)
    norms = norm_log(job, trainable, world, trainer.step)
    compiles = is_compiled(job, trainable.model, world.device)
    in_graphs = compiled_blocks(trainable.model, compiles and is_in_pieces(trainable))
    with (
        closing(_Wrapped(trainable, job, world, compiles)) as wrapped,
        closing(Meter(job, world, trainer.step, norms)) as meter,
    ):
        built = built_ahead(examples.batches(trainer.position, world.rank, world.size), world.device)
        showing = progress(job.name, job.end, start=trainer.step, is_wanted=world.is_main, has_lines=False)
        with in_graphs, checkpoints, built as batches, stop_on_signals() as stop, showing as bar:
            reporter = Reporter(job, bar, trainer.step, job.speaks and world.is_main, world.size)
            while not trainer.is_over(job.end, patience):
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
                    trainer.validation_loss = _validated(trainer, validate, meter, job, world)
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
            trainer.validation_loss = _validated(trainer, validate, meter, job, world)
        ended = _with_best(trainer)
        meter.flush()
        reporter.finish(trainer, meter.mean_speed)
    losses = {
        "train_loss": trainer.train_loss,
        "validation_loss": trainer.validation_loss,
        **ended,
        "processor_seconds": round(time.process_time() - begun, 3),
    }
    return losses, checkpoint_of(trainer, take=lambda tensor: tensor)


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

    def __init__(self, trainable: Trainable, job: Job, world: World, compiles: bool) -> None:
        self.trainable, self.world, self._is_sharded = trainable, world, is_in_pieces(trainable)
        self.compiles = compiles and not self._is_sharded  # of pieces, blocks are compiled each
        self._sends_half = job.training.gradient_exchange == "bf16"
        self._parameters = list(trainable.parameters.values())
        self._learning: list[bool] = []
        self._model: nn.Module | None = None

    def model(self) -> nn.Module:
        """The wrapped model for the parameters that learn now (called on every rank)."""
        learning = [weight.requires_grad for weight in self._parameters]
        if self._model is None or learning != self._learning:
            self._learning, self._model = learning, None  # the old one lets go of its hooks first
            wrapped = self.trainable.model
            if not self._is_sharded:
                wrapped = parallelise(wrapped, self.world, self.trainable.may_skip_parameters, self._sends_half)
            self._model = compiled(wrapped) if self.compiles else wrapped
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
        exchange_gradients(model, job.training, index == count - 1)
        with _without_sync(model, index < count - 1), autocast(job.training, world.device):
            loss = trainer.trainable.loss(model, tensors) / count
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    forget_unvisited(trainer.trainable)
    mask_gradients(trainer.trainable)
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
    return whole_norm(nn.utils.clip_grad_norm_(trainable.parameters.values(), most))


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


def _without_sync(model: nn.Module, active: bool) -> AbstractContextManager[object]:
    """DDP averages gradients only in the last piece of an accumulated batch; torch.compile hides it in `_orig_mod`."""
    wrapped = getattr(model, "_orig_mod", model)
    if active and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        context: AbstractContextManager[object] = wrapped.no_sync()
        return context
    return nullcontext()


def _due(step: int, every: int, job: Job) -> bool:
    return step % every == 0 or step == job.end


def _validated(trainer: Trainer, validate: Callable[[], float], meter: Meter, job: Job, world: World) -> float:
    """Validation loss, also written to the metrics; on the bare model, so it needs no collective of DDP."""
    trainer.trainable.model.eval()
    with torch.no_grad(), measuring(job.training, world.device):
        loss = validate()
    meter.write(step=trainer.step, validation_loss=loss, validation_perplexity=perplexity(loss))
    return loss


def _stop_message(trainer: Trainer, job: Job, stop: StopFlag) -> str:
    return (
        f"{job.name} was stopped by {stop.signal_name or 'a signal to another rank'} at step {trainer.step} of "
        f"{job.end}; run the same command again to continue"
    )
