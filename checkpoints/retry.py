"""The one gate through which every storage call goes: bounded retries with backoff and a log line, then a clear error.

The libraries below are told not to retry by themselves, so the number of requests is known and each failure is logged.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from checkpoints import explain
from checkpoints.environment import max_attempts
from checkpoints.errors import StoreError
from checkpoints.redact import redact

Result = TypeVar("Result")
logger = logging.getLogger("checkpoints")

FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 15.0


def call(action: str, url: str, operation: Callable[[], Result]) -> Result:
    """Run one storage operation, again after passing trouble.

    FileNotFoundError (the key, not the bucket, is missing) and FileExistsError pass; all else becomes StoreError.
    """
    attempts = max_attempts()
    for attempt in range(1, attempts + 1):
        try:
            return operation()
        except Exception as error:
            if _is_answer(error):
                raise
            if attempt == attempts or not explain.is_transient(error):
                raise explain.explain(error, action, url, attempt) from error
            wait(action, url, error, attempt, attempts)
    raise AssertionError("the last attempt returns or raises")


def wait(action: str, url: str, error: Exception, attempt: int, attempts: int) -> None:
    """Log a failed attempt and sleep before the next, twice as long each time and with a random part."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.7, 1.3)
    reason = explain.answer_code(error) or redact(" ".join(f"{type(error).__name__}: {error}".split()))
    logger.warning(
        "could not %s %s (%s); attempt %d of %d follows in %.1f s",
        action, redact(url), reason[:200], attempt + 1, attempts, delay,
    )  # fmt: skip
    time.sleep(delay)


def _is_answer(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError):
        return not explain.is_missing_bucket(error)
    return isinstance(error, FileExistsError | NotADirectoryError | StoreError)
