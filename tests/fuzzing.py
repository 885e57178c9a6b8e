"""Readers that are given broken inputs: nothing but their own errors, short ones, and each within seconds."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 3


@contextmanager
def time_limit(what: object, seconds: float = SECONDS) -> Iterator[None]:
    """Fail when the block runs longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s: {what!r:.200}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def allows_only(
    errors: type[Exception] | tuple[type[Exception], ...], inputs: Iterable[Any], read: Callable[[Any], object]
) -> None:
    """Read every input; what is raised must be one of these errors, with a message that a screen holds."""
    for item in inputs:
        message = ""
        with time_limit(item):
            try:
                read(item)
            except errors as error:
                message = str(error)
        assert len(message) < 20_000, f"{item!r:.200}"
