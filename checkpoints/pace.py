"""How many requests to a store are under way at once: more of them while that brings more bytes a second.

One connection to S3 brings some 50 to 100 MB/s whatever the network could do, so that a fast network wants many; where
the network, the server or the processor is what limits, more of them only wait for each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

LEAST, MOST = 8, 32
MOST_SENT = 16  # each holds a part in memory
WINDOW_SECONDS = 1.0
GAIN = 1.25  # twice the connections bring twice the bytes where connections are what limits; less than this is noise
WINDOWS_UNTIL_TRIED_AGAIN = 60


class Pace:
    """Doubles the requests at once as long as the measured rate grows with them; for many transfers of one store.

    Only windows count in which so many were under way from beginning to end: not those in which connections are opened,
    or in which a transfer has little left.
    """

    def __init__(self, least: int = LEAST, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._least, self.most, self._clock = least, most, clock
        self._lock = threading.Lock()
        self._running = 0
        self._begun: float | None = None
        self._bytes = 0
        self._best: float | None = None
        self._waits = 0
        self.width = least

    @contextmanager
    def request(self) -> Iterator[None]:
        """While the body runs bytes are expected of it."""
        with self._lock:
            self._running += 1
            self._look()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self._look()

    def passed(self, size: int) -> None:
        """Count bytes that have come or gone."""
        with self._lock:
            self._bytes += size
            if self._begun is None:
                return
            seconds = self._clock() - self._begun
            if seconds >= WINDOW_SECONDS:
                self._take(self._bytes / seconds)
                self._begun = None
                self._look()

    def _look(self) -> None:
        """Begin a window, or give it up."""
        if self._running < self.width:
            self._begun = None
        elif self._begun is None:
            self._begun, self._bytes = self._clock(), 0

    def _take(self, rate: float) -> None:
        if self._waits:
            self._waits -= 1
            self._best = None
        elif self._best is None or rate >= GAIN * self._best:
            self._best = rate
            self._waits = 0 if self.width < self.most else WINDOWS_UNTIL_TRIED_AGAIN
            self.width = min(2 * self.width, self.most)
        else:
            self.width = max(self.width // 2, self._least)
            self._waits = WINDOWS_UNTIL_TRIED_AGAIN


@lru_cache(maxsize=64)
def reading_of(place: str) -> Pace:
    """The pace at which this process reads from a store, a bucket of it say."""
    return Pace()


@lru_cache(maxsize=64)
def writing_to(place: str) -> Pace:
    """The pace at which this process writes to a store."""
    return Pace(most=MOST_SENT)
