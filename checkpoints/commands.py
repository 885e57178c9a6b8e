"""Commands as messages print them: to be pasted into a shell as they are, and without secrets."""

from __future__ import annotations

import shlex

from checkpoints.redact import redact


def shown_command(*words: str) -> str:
    """The words of a command as a shell takes them: in quotes where a blank or a sign would mean something else."""
    return shlex.join(redact(word) for word in words)
