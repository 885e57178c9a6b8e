"""What the command lines of all programs share: `-h`, `--version`, and a sentence for a command that there is not."""

from __future__ import annotations

import difflib
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PROGRAMS = {
    "modularforge": ("run-all", "prepare-data", "train", "backbone", "expert", "assemble", "evaluate", "generate",
                     "info", "init", "settings", "sanity", "report", "compare", "study", "fetch", "push", "export",
                     "export-tokens", "route", "analyze", "transcribe", "experts"),
    "modularforge-launcher": ("launch", "plan", "status", "logs", "cancel", "rerun", "resume", "wait"),
    "modularforge-checkpoints": ("ls", "verify", "pull", "push", "gc"),
}  # fmt: skip
"""By program its commands, for who types one of them at another program."""
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """A group that says what somebody may have meant who typed a command that it has not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of the first word."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(_unknown(args[0], list(self.commands)))
        return super().resolve_command(ctx, args)


def _unknown(word: str, known: list[str]) -> str:
    elsewhere = [program for program, commands in PROGRAMS.items() if word in commands]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    said = f"No such command {word!r:.80}. "
    if elsewhere:
        return f"{said}It is one of another program: {elsewhere[0]} {word}"
    return said + (f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}.")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"modularforge {_version()}")
        raise typer.Exit


def version_option(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Only its signature is used: the option of a whole program."""


def _version() -> str:
    try:
        return metadata.version("modularforge")
    except metadata.PackageNotFoundError:
        return "(not installed)"
