"""Exit codes of every program here: 0 done, 2 the user can act, 130 stopped and resumable, 1 a bug.

An error that a user can repair is printed as its sentence alone; ``--debug`` shows where it was raised.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from checkpoints.errors import UserError
from checkpoints.retry import explain, is_full
from checkpoints.screen import bug, safe_streams, say
from modularforge.errors import Interrupted

USER_ERROR = 2
INTERRUPTED = 130
# How libraries in Rust (safetensors, tokenizers) and C++ (Arrow) tell what the system refused, in errors of their own.
SYSTEM_ERROR = re.compile(r"(?:os error |errno:? )(\d{1,3})\b", re.IGNORECASE)


def run_app(app: Any) -> None:
    """Call a typer application and turn exceptions into exit codes; nothing is said with a secret in it."""
    with safe_streams():
        _run(app, "--debug" in sys.argv)


def _run(app: Any, debug: bool) -> None:
    try:
        app()
    except UserError as error:
        if debug:
            bug()
        _complain(f"error: {error}", USER_ERROR)
    except Interrupted as stop:
        _complain(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # newer typers make a silent 130 of Ctrl-C
            raise
        _complain("interrupted; what was committed is kept, and the same command continues", INTERRUPTED)
    except OSError as error:
        if debug or error.errno is None:
            bug()
        _complain(f"error: {refused_by_the_system(error)}", USER_ERROR)
    except Exception as error:
        sentence = _foreign_sentence(error)
        if debug or sentence is None:
            bug()
        _complain(f"error: {sentence}", USER_ERROR)


def refused_by_the_system(error: OSError) -> str:
    """What the operating system refused, and what to do; a failed write names no file, a failed open does."""
    what = error.filename if error.filename is not None else "a file that was being read or written"
    if is_full(error):
        return f"{what} cannot be used, because the disk or the quota is full; free some space and start again"
    return f"{what!s:.300} cannot be used: {error.strerror}; check the path and its rights"


def _foreign_sentence(error: Exception) -> str | None:
    """What a user can do about an error that libraries raise in their own words; None for bugs."""
    if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore"):
        return str(explain(error, "read", "object storage"))
    text = str(error)
    if match := SYSTEM_ERROR.search(text):
        return refused_by_the_system(OSError(int(match[1]), os.strerror(int(match[1]))))
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"the model and its batch must fit into memory, but do not ({first}); "
            "lower batch_size or the model's sizes, or raise accumulation_steps; `modularforge info` counts parameters"
        )
    return None


def _complain(message: str, code: int) -> None:
    say(message, error=True)
    sys.exit(code)
