"""Exit codes of every program here: 0 done, 2 the user can act, 130 stopped and resumable, 1 a bug.

An error that a user can repair is printed as its sentence alone; ``--debug`` shows where it was raised.
"""

from __future__ import annotations

import sys
from typing import Any

from checkpoints.errors import UserError
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
    except KeyboardInterrupt:
        _complain("interrupted; what was committed is kept, and the same command continues", INTERRUPTED)
    except OSError as error:
        if debug or error.filename is None:
            raise
        _complain(
            f"error: {error.filename} cannot be used: {error.strerror}; check the path and its rights", USER_ERROR
        )


def _complain(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
