"""Every error a user can cause or repair, sorted by who can act on it.

A message is one sentence with four parts: the name, what it must be, what it is, what to do.
The command line prints it without a traceback and exits with 2; a traceback appears with ``--debug``.
"""

from checkpoints.errors import DataError, StoreError, UserError
from checkpoints.redact import redact

__all__ = [
    "ConfigError", "DataError", "Interrupted", "MismatchError", "StoreError", "TrainingError", "UserError", "one_line",
]  # fmt: skip


def one_line(value: object, limit: int = 200) -> str:
    """What a library said, or what an input holds, as part of a message: one line, without secrets, cut."""
    text = " ".join(redact(str(value)).split())  # half of a secret would not be known for one
    printable = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return printable if len(printable) <= limit else f"{printable[:limit]}…"


class ConfigError(UserError):
    """A setting is unknown, mistyped, or impossible together with another."""


class MismatchError(UserError):
    """Tensors, artifacts or settings that do not belong together."""


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, or too little data for one batch."""


class Interrupted(Exception):
    """A signal asked the job to stop; its state is in a checkpoint and the same command continues it."""
