"""Exit codes of every program here: 0 done, 2 the user can act, 130 stopped and resumable, 1 a bug.

An error that a user can repair is printed as its sentence alone; ``--debug`` shows where it was raised.
"""

from __future__ import annotations

import sys
from typing import Any

from checkpoints.errors import UserError
from checkpoints.explain import explain
from checkpoints.redact import redact
from modularforge.errors import Interrupted

USER_ERROR = 2
INTERRUPTED = 130


def run_app(app: Any) -> None:
    """Call a typer application and turn exceptions into exit codes."""
    debug = "--debug" in sys.argv
    try:
        app()
    except UserError as error:
        if debug:
            raise
        _complain(f"error: {error}", USER_ERROR)
    except Interrupted as stop:
        _complain(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # newer typers make a silent 130 of Ctrl-C
            raise
        _complain("interrupted; what was committed is kept, and the same command continues", INTERRUPTED)
    except OSError as error:
        if debug or error.filename is None:
            raise
        _complain(
            f"error: {error.filename} cannot be used: {error.strerror}; check the path and its rights", USER_ERROR
        )
    except Exception as error:
        sentence = _foreign_sentence(error)
        if debug or sentence is None:
            raise
        _complain(f"error: {sentence}", USER_ERROR)


def _foreign_sentence(error: Exception) -> str | None:
    """What a user can do about an error that libraries raise in their own words; None for bugs."""
    if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore"):
        return str(explain(error, "read", "object storage"))
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"the model and its batch must fit into memory, but do not ({first}); "
            "lower batch_size or the model's sizes, or raise accumulation_steps; `modularforge info` counts parameters"
        )
    return None


def _complain(message: str, code: int) -> None:
    print(redact(message), file=sys.stderr, flush=True)
    sys.exit(code)
