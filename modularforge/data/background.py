"""Threads beside the work: an iterator a few items ahead of its consumer, so that reading, tokenising and writing
overlap, and log lines of long silent calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from typing import Any, TypeVar

from modularforge.log import logger

T = TypeVar("T")
_END = object()
SILENCE_SECONDS = 30.0


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def in_background(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items in the same order, at most `depth` ahead; an error in the thread is raised here.

    When the consumer stops early the thread stops after the item it is at, and closes `items`.
    """
    queue: Queue[Any] = Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, queue, stop), daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        _drain(queue)  # makes room, so that a thread waiting to put its item sees the stop
        thread.join()


@contextmanager
def still_at_it(what: str) -> Iterator[None]:
    """Log every half minute that a call which says nothing itself still runs."""
    started, done = time.monotonic(), threading.Event()

    def say() -> None:
        while not done.wait(SILENCE_SECONDS):
            logger.info("still %s: %.0f s", what, time.monotonic() - started)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _fill(items: Iterator[Any], queue: Queue[Any], stop: threading.Event) -> None:
    try:
        for item in items:
            queue.put(item)
            if stop.is_set():
                return
        queue.put(_END)
    except BaseException as error:  # whatever happens is raised in the consumer
        queue.put(_Failure(error))
    finally:
        if hasattr(items, "close"):
            items.close()


def _drain(queue: Queue[Any]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        return
