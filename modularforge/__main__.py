"""``python -m modularforge`` and the ``modularforge`` command."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; the exit code says who can act (see exits.py)."""
    try:
        from modularforge.cli import app
        from modularforge.exits import run_app
    except KeyboardInterrupt:  # even the first tenths of a second deserve a quiet end
        sys.exit(INTERRUPTED)
    run_app(app)


if __name__ == "__main__":
    main()
