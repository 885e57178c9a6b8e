"""``python -m modularforge`` and the ``modularforge`` command."""

from __future__ import annotations

from modularforge.cli import app
from modularforge.exits import run_app


def main() -> None:
    """Run the command line; the exit code says who can act (see exits.py)."""
    run_app(app)


if __name__ == "__main__":
    main()
