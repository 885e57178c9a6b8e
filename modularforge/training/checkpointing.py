"""Keeps a training job's state: resumes it, saves it in the background, and lets all ranks fail or stop together.

A stop is polite: a signal only sets a flag, and the loop saves a checkpoint at the end of its step. A second Ctrl-C
interrupts at once; what was committed stays.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, TracebackType

import torch.distributed as dist
from torch import Tensor

from checkpoints.pieces import Part
from checkpoints.ranks import load_newest_on_all_ranks, together
from checkpoints.saver import CheckpointSaver
from checkpoints.training import Checkpoint, commit_pieces, forget_unfinished, load_newest_checkpoint
from modularforge.log import logger
from modularforge.model.shards import own_piece
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.optimizer import Trainer

SECONDS_BETWEEN_EXCHANGES, STEPS_BETWEEN_EXCHANGES = 1.0, 8
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Checkpointing:
    """The checkpoints of one job; a job without `checkpoint_url` keeps none. Used on every rank, rank 0 writes.

    Of a model in pieces every rank writes its `part`, unless a lower one has the same; when all are written, rank 0
    commits the checkpoint. Training waits only while its tensors are copied; a failed save stops all ranks at the next
    step.
    """

    def __init__(self, job: Job, world: World, part: Part | None = None) -> None:
        self.job, self.world, self.part = job, world, part
        self.saver: CheckpointSaver | None = None
        self._kept = (job.training.keep_checkpoints, job.training.keep_checkpoints_every)
        self._uncommitted: Checkpoint | None = None  # whose pieces are being written
        self._steps, self._steps_between, self._exchanged = 0, 1, time.perf_counter()  # since ranks spoke of a stop
        if world.rank < (part.count if part else 1) and job.checkpoint_url is not None:
            self.saver = CheckpointSaver(job.checkpoint_url, job.fingerprint, *self._kept, part)

    def resume(self, trainer: Trainer, start: Checkpoint | None = None) -> None:
        """Continue from the newest checkpoint of this job, where there is one, else from `start`."""
        self._prepare_after_first_step(trainer)
        checkpoint = self._newest()
        if checkpoint is None and start is not None:
            checkpoint = replace(start, tensors=self.part.of(start.tensors)) if self.part else start
        if checkpoint is None:
            return
        trainer.restore(checkpoint.tensors)
        trainer.step, trainer.position = checkpoint.step, checkpoint.state["position"]
        trainer.train_loss = checkpoint.state["train_loss"]
        trainer.validation_loss = checkpoint.state["validation_loss"]
        if trainer.best:
            trainer.best.restore(checkpoint.state["best"], checkpoint.tensors)
        logger.info("%s continues at step %d of %d", self.job.name, trainer.step, self.job.end)

    def agree_to_stop(self, wants_to_stop: bool) -> bool:
        """Whether any rank wants to stop; raises on all when a background save has failed.

        Called by every rank after each step. Several ranks exchange it in every step that takes a second, and in every
        eighth of short ones: a stop is seen at most so much later than by one process.
        """
        self._steps += 1
        if self._steps < self._steps_between:
            return False
        saver, seconds = self.saver, (time.perf_counter() - self._exchanged) / self._steps
        own = [wants_to_stop, bool(saver and saver.has_failed), bool(saver and saver.is_busy), seconds]
        stops, failures, busy, seconds = self.world.total([float(value) for value in own])
        if self.world.size > 1:  # by a number that all have
            share = min(STEPS_BETWEEN_EXCHANGES, SECONDS_BETWEEN_EXCHANGES * self.world.size / max(seconds, 1e-9))
            self._steps_between = max(1, int(share))
        self._steps, self._exchanged = 0, time.perf_counter()
        if failures:
            self._together(self._check)
        if not busy:
            self._commit()
        return stops > 0

    def save(self, trainer: Trainer) -> None:
        """Copy the state and let it be written; the losses were found finite just before."""

        def start() -> None:
            if self.saver:
                self.saver.save(checkpoint_of(trainer))

        if self._uncommitted:
            self.wait()
        self._together(start)
        if self.part and self.job.checkpoint_url is not None:
            self._uncommitted = replace(checkpoint_of(trainer), tensors={})

    def wait(self) -> None:
        """Return when the last save is committed; raises on all ranks when it failed."""
        self._together(self._wait)
        self._commit()

    def _commit(self) -> None:
        """Commit the checkpoint whose pieces are all written, if there is one."""
        uncommitted, self._uncommitted = self._uncommitted, None
        if uncommitted is None:
            return

        def commit() -> None:
            if self.world.is_main and self.part and self.job.checkpoint_url is not None:
                commit_pieces(self.job.checkpoint_url, uncommitted, self.job.fingerprint, self.part, *self._kept)

        self._together(commit)

    def __enter__(self) -> Checkpointing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """At the end of training wait with all ranks; after an error only let rank 0 finish its write."""
        if error is None:
            self.wait()
        elif self.saver:
            self.saver.finish()

    def _prepare_after_first_step(self, trainer: Trainer) -> None:
        """Let the saver get its memory while training goes on; only then does AdamW have its moments."""

        def prepare(*_: object) -> None:
            hook.remove()
            if self.saver:
                self.saver.prepare(trainer.tensors())

        hook = trainer.optimizer.register_step_post_hook(prepare)

    def _check(self) -> None:
        if self.saver:
            self.saver.check()

    def _wait(self) -> None:
        if self.saver:
            self.saver.wait()

    def _newest(self) -> Checkpoint | None:
        url, fingerprint, fallback = (
            self.job.checkpoint_url,
            self.job.fingerprint,
            self.job.training.checkpoint_fallback,
        )
        if url is None:
            return None
        self._together(lambda: forget_unfinished(url) if self.world.is_main else None)
        if self.world.size == 1:
            return load_newest_checkpoint(url, fingerprint, fallback)
        return load_newest_on_all_ranks(url, fingerprint, dist, self.world.device, fallback, self.part)

    def _together(self, action: Callable[[], object]) -> None:
        if self.world.size == 1:
            action()
        else:
            together(action, dist, self.world.device)


def checkpoint_of(trainer: Trainer, take: Callable[[Tensor], Tensor] = own_piece) -> Checkpoint:
    """All that a job needs to go on from here; `take` says what is here of that which lies in pieces."""
    state = {
        "position": trainer.position,
        "train_loss": trainer.train_loss,
        "validation_loss": trainer.validation_loss,
        **({"best": trainer.best.state} if trainer.best else {}),
    }
    return Checkpoint(trainer.step, trainer.tensors(take), state)


class StopFlag:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first, let a second Ctrl-C through."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch the stop signals while the block runs; outside the main thread nothing is caught."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
