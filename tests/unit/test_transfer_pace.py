"""How many requests are under way at once, and the buffers of what is sent."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from checkpoints.pace import LEAST, MOST, WINDOW_SECONDS, WINDOWS_UNTIL_TRIED_AGAIN, Pace
from checkpoints.parallel import as_done
from checkpoints.parts import Parts


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def settled(pace: Pace, clock: Clock, rate_at: dict[int, float], windows: int) -> list[int]:
    """Widths at the ends of windows, where a network brings so many bytes a second with so many requests."""
    widths = []
    for _ in range(windows):
        with ExitStack() as requests:
            for _ in range(pace.width):
                requests.enter_context(pace.request())
            clock.now += WINDOW_SECONDS
            pace.passed(int(rate_at[pace.width] * WINDOW_SECONDS))
        widths.append(pace.width)
    return widths


@pytest.mark.parametrize(
    ("rates", "width"),
    [
        ({8: 800.0, 16: 1600.0, 32: 3200.0}, 32),  # each connection brings the same
        ({8: 800.0, 16: 1600.0, 32: 1650.0}, 16),  # the network is full with 16
        ({8: 800.0, 16: 810.0, 32: 820.0}, 8),  # and here with 8
        ({8: 800.0, 16: 400.0, 32: 200.0}, 8),  # a server that slows down
    ],
)
def test_requests_are_doubled_as_long_as_the_rate_grows_with_them(rates: dict[int, float], width: int) -> None:
    clock = Clock()
    pace = Pace(LEAST, MOST, clock)
    widths = settled(pace, clock, rates, 8)
    assert widths[-1] == width
    assert set(widths) <= {8, 16, 32}


def test_more_requests_are_tried_again_after_a_while() -> None:
    clock = Clock()
    pace = Pace(LEAST, MOST, clock)
    assert settled(pace, clock, {8: 800.0, 16: 810.0}, 8)[-1] == 8
    later = settled(pace, clock, {8: 800.0, 16: 1600.0, 32: 3200.0}, WINDOWS_UNTIL_TRIED_AGAIN + 8)
    assert later[-1] == 32


def test_only_windows_with_all_requests_under_way_are_measured() -> None:
    """Neither the time between transfers counts, nor that in which connections are opened or the last bytes come."""
    clock = Clock()
    pace = Pace(LEAST, MOST, clock)
    for rate in (800, 1600, 3200):
        clock.now += 1000.0
        with ExitStack() as requests:
            for _ in range(pace.width):
                clock.now += 10.0
                pace.passed(1)
                requests.enter_context(pace.request())
            pace.passed(rate * 10)
            clock.now += WINDOW_SECONDS
            before = pace.width
        clock.now += 10.0
        pace.passed(1)
        assert pace.width == before
    assert settled(pace, clock, {8: 800.0, 16: 1600.0, 32: 3200.0}, 2) == [16, 32]


def test_parts_are_the_same_bytes_in_buffers_that_are_filled_again() -> None:
    content = bytes(range(256)) * 41
    for chunk_bytes in (1, 7, 100, 5000, len(content)):
        chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
        parts, got, buffers = Parts(chunks, 100), bytearray(), set()
        for part in parts:
            assert len(part) == 100 or len(got) + len(part) == len(content)
            got += part
            buffers.add(id(part))
            parts.give_back(part)
        assert got == content
        assert len(buffers) <= 2
    assert list(Parts([], 100)) == []
    assert list(Parts([b"", b"1234", b""], 4)) == [b"1234"]


def test_a_part_that_was_not_given_back_is_not_filled_again() -> None:
    parts = list(Parts([bytes([i]) * 10 for i in range(5)], 10))
    assert parts == [bytes([i]) * 10 for i in range(5)]


def test_a_slow_call_holds_up_no_other() -> None:
    others = threading.Barrier(4)

    def work(item: int) -> int:
        if item < 4:
            others.wait(10)  # the first, and three more one after another in the second place
        return item

    pairs = threading.Semaphore(0)

    def first_waits(item: int) -> int:
        if item == 0:
            assert pairs.acquire(timeout=10)
        elif item == 5:
            pairs.release()
        return item

    assert sorted(as_done(work, range(4), lambda: 4)) == [0, 1, 2, 3]
    assert list(as_done(first_waits, range(6), lambda: 2))[:4] == [1, 2, 3, 4]


def test_an_error_of_a_call_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def work(item: int) -> int:
        if item == 1:
            raise ValueError("one")
        ended.append(item)
        return item

    with pytest.raises(ValueError, match="one"):
        list(as_done(work, range(3), lambda: 3))
    assert sorted(ended) in ([0], [0, 2])
