"""Runs a function over items in a few threads and yields the results in order, holding only a few at a time.

Plain threads instead of a pool: pools refuse work once the interpreter begins to exit, and a background save may still
be uploading then. A thread costs 50 microseconds; an item here is a request of many milliseconds.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

LOOK_AGAIN_SECONDS = 0.5
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results of `function` in the order of `items`; at most `workers` items are under way or waiting to be yielded.

    The first error is raised in the caller's thread; all started calls have ended by then.
    """
    running: deque[_Call[Item, Result]] = deque()
    try:
        for item in items:
            running.append(_Call(function, item))
            if len(running) >= workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for call in running:
            call.thread.join()


def as_done(function: Callable[[Item], Result], items: Iterable[Item], workers: Callable[[], int]) -> Iterator[Result]:
    """Results of `function` as they come, so that a slow call holds up no other; at most `workers()` are under way.

    The first error is raised in the caller's thread; all started calls have ended by then.
    """
    running: set[_Call[Item, Result]] = set()
    ended: queue.SimpleQueue[_Call[Item, Result]] = queue.SimpleQueue()

    try:
        for item in items:
            running.add(_Call(function, item, ended.put))
            while len(running) >= workers():
                try:
                    call = ended.get(timeout=LOOK_AGAIN_SECONDS)
                except queue.Empty:  # there may be more workers by now
                    continue
                running.remove(call)
                yield call.result()
        while running:
            running.remove(call := ended.get())
            yield call.result()
    finally:
        for call in running:
            call.thread.join()


class _Call(Generic[Item, Result]):
    """One call in a thread of its own, which is told of at its end."""

    def __init__(
        self,
        function: Callable[[Item], Result],
        item: Item,
        ended: Callable[[_Call[Item, Result]], object] = lambda call: None,
    ) -> None:
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._ended = ended
        self.thread = threading.Thread(target=self._run, args=(function, item))
        self.thread.start()

    def _run(self, function: Callable[[Item], Result], item: Item) -> None:
        try:
            self._results.append(function(item))
        except BaseException as error:  # carried to the caller's thread
            self._error = error
        self._ended(self)

    def result(self) -> Result:
        self.thread.join()
        if self._error:
            raise self._error
        return self._results.pop()


@contextmanager
def meanwhile(function: Callable[[], object]) -> Iterator[None]:
    """Run `function` in a thread while the body of the `with` runs; its error is raised at the end of the body."""
    call = _Call(lambda _: function(), None)
    try:
        yield
    finally:
        call.thread.join()
    call.result()


@contextmanager
def consumer(function: Callable[[Item], object], ahead: int) -> Iterator[Callable[[Item], None]]:
    """A thread that calls `function` on all that is handed over, in order; at most `ahead` items wait for it.

    One thread for many items: a thread per item would wait for the scheduler each time, which on a busy machine took
    longer than the hashing. All items are done at the end of the body, where the thread's error is raised.
    """
    waiting: queue.Queue[Item | None] = queue.Queue(ahead)

    def consume(_: None) -> None:
        error: BaseException | None = None
        while (item := waiting.get()) is not None:
            try:
                if error is None:
                    function(item)
            except BaseException as caught:  # the queue is emptied all the same, so that nobody waits for ever
                error = caught
        if error:
            raise error

    call = _Call(consume, None)
    try:
        yield waiting.put
    finally:
        waiting.put(None)
        call.thread.join()
    call.result()
