"""What a check says: findings while all is well, an error with its cause when it is not."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modularforge.errors import UserError

Check = Callable[[], Iterator[str]]


class SanityError(UserError):
    """Something is not as it must be; the message says what and what to do."""


@dataclass
class Outcome:
    """One check: what it found, the cause of its failure if it failed, and how long it took."""

    name: str
    findings: list[str] = field(default_factory=list)
    cause: str | None = None
    seconds: float = 0.0


def perform(name: str, check: Check, say: Callable[[str], None]) -> Outcome:
    """Run one check, telling each finding as it comes; whatever is raised becomes the cause of the failure."""
    outcome, start = Outcome(name), time.perf_counter()
    say(name)
    try:
        for finding in check():
            outcome.findings.append(finding)
            say(f"  ok    {finding}")
    except Exception as error:  # a check may fail in any way, and every way must be told
        outcome.cause = _cause(error)
        say(f"  FAIL  {outcome.cause}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def _cause(error: Exception) -> str:
    """The error's sentence; for one that is not meant for users also its type and where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
