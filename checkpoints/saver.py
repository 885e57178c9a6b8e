"""Saves training checkpoints in the background: the training loop waits only while its tensors are copied.

At most one save is under way, so host memory holds at most one copy of the state, in buffers that are used again.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from checkpoints.pieces import Part
from checkpoints.retry import logger
from checkpoints.training import Checkpoint, save_checkpoint, save_piece


class CheckpointSaver:
    """Saves the checkpoints of one job (on rank 0 only); an error surfaces at the next `save`, `check` or `wait`.

    With a `part` it saves that piece of each, which becomes a checkpoint when the caller commits all of them.
    A program that ends without `wait` still finishes the save, or has its failure in the log.
    """

    def __init__(
        self, url: str, fingerprint: str, keep_last: int, keep_every: int = 0, part: Part | None = None
    ) -> None:
        self._url = url
        self._part = part
        self._fingerprint = fingerprint
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._preparation: threading.Thread | None = None
        self._error: Exception | None = None
        self._has_told_of_waits = False
        self.stall_seconds = 0.0
        _SAVERS.add(self)

    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the buffers for tensors like these in the background, so that the first save waits for the copy alone.

        To get fresh memory takes several times as long as to fill it, and longer where it is pinned for a GPU.
        """

        def make() -> None:
            try:
                self._buffers = {name: self._buffer(name, tensor).zero_() for name, tensor in tensors.items()}
            except Exception as error:  # the save will make them itself, and raise what is wrong
                logger.warning("the buffers for checkpoints are not made in advance: %s", error)

        self._preparation = threading.Thread(target=make, name="prepare-save")
        self._preparation.start()

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the state and return; tensors and `state` may change right after. Waits for an earlier save first."""
        start = time.monotonic()
        if self._thread and self._thread.is_alive() and not self._has_told_of_waits:
            self._has_told_of_waits = True  # once: a fast job would fill its log with it
            logger.warning(
                "the save before step %d is not done yet; training waits for it, and for later ones without a word",
                checkpoint.step,
            )
        self.wait()
        copied = self._copy(checkpoint)
        self._thread = threading.Thread(target=self._write, args=(copied,), name=f"save-{checkpoint.step}")
        self._thread.start()
        self.stall_seconds = time.monotonic() - start

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error of a background save that has failed; costs nothing, for every step of the loop."""
        if self._error:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being written any more; raises the error of the last save."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last save; its error is raised unless another one is on its way already."""
        try:
            self.wait()
        except Exception:
            if error is None:
                raise

    def finish(self) -> None:
        """Return when nothing is being written any more; a failure is only in the log."""
        if self._thread:
            self._thread.join()

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            if self._part:
                save_piece(self._url, checkpoint, self._fingerprint, self._part)
            else:
                save_checkpoint(self._url, checkpoint, self._fingerprint, self._keep_last, self._keep_every)
        except Exception as error:  # raised in the caller's thread by `check`
            logger.error("the checkpoint of step %d is not saved: %s", checkpoint.step, error)
            self._error = error

    def _copy(self, checkpoint: Checkpoint) -> Checkpoint:
        if self._preparation:
            self._preparation.join()
            self._preparation = None
        state: dict[str, Any] = json.loads(json.dumps(checkpoint.state, allow_nan=False))
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in checkpoint.tensors.items()}
        for name, tensor in checkpoint.tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in checkpoint.tensors.values()):
            torch.cuda.synchronize()
        return Checkpoint(checkpoint.step, dict(self._buffers), state)

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The host copy of a tensor, pinned for a GPU's so that the copy runs at full speed."""
        known = self._buffers.get(name)
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


_SAVERS: weakref.WeakSet[CheckpointSaver] = weakref.WeakSet()


def _finish_all() -> None:
    for saver in list(_SAVERS):
        saver.finish()


# HTTP clients need thread pools, which Python shuts down before it joins threads and calls `atexit`. This hook, the one
# that the pools use themselves, runs before theirs; without it such a save fails, with its failure in the log.
if register := getattr(threading, "_register_atexit", None):
    register(_finish_all)
