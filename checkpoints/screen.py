"""What is shown: text that somebody else wrote stays text, and secrets stay here.

Names of runs, labels, files and settings may hold rich's markup (`[/x]`, `:smile:`), terminal escapes and secrets. So
this is the only file that makes rich's tables, bars and consoles, and every program writes through `safe_streams`.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, NoReturn

from checkpoints.redact import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Control characters, separators of lines, half surrogate pairs: they move the cursor, hide text, or cannot be encoded.
ESCAPED_CATEGORIES = frozenset({"Cc", "Zl", "Zp", "Cs"})
TURNS = frozenset(
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)  # the direction of writing

SECONDS_BETWEEN_LINES = 10.0  # of what is told of in a log; what is done sooner says nothing
logger = logging.getLogger("checkpoints")
UNDERSCORE = re.compile("(?<=[^_])_(?=[^_])")
WIDEST = 10_000  # columns; rich measures tables within some width


def literal(text: str, keep: str = "\n\t") -> str:
    """The text with control characters, but for those in `keep`, shown as Python writes them (`\\x1b`)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in keep or not _is_hidden(character) else _escaped(character)
                   for character in text)  # fmt: skip


def breakable(name: str, gap: str) -> str:
    """A name with `gap` for underscores between two of its parts."""
    return gap.join(UNDERSCORE.split(name))


def short(text: str, characters: int) -> str:
    """Text for a place that holds so many characters."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def say(text: str = "", *, end: str = "\n", error: bool = False) -> None:
    """Print text for people, at once."""
    print(literal(redact(text)), end=end, file=sys.stderr if error else sys.stdout, flush=True)


def bug() -> NoReturn:
    """End the program after an unexpected error, which is the one being handled: its traceback, and exit code 1."""
    say(traceback.format_exc().rstrip(), error=True)
    sys.exit(1)


def console(**options: Any) -> Console:
    """A console that takes no text for markup, emoji or numbers."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    numbers_from: int | None = None,
    marked: int | None = None,
    **options: Any,
) -> Table:
    """A table of literal text; columns from `numbers_from` on stand to the right, the row `marked` is bold."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=None if title is None else Text(_cell(title), style="table.title"), **options)
    for place, text in enumerate(header):
        is_number = numbers_from is not None and place >= numbers_from
        made.add_column(Text(_cell(text)), justify="right" if is_number else "left", no_wrap=numbers_from is not None)
    for place, row in enumerate(rows):
        made.add_row(*(Text(_cell(text)) for text in row), style="bold green" if place == marked else None)
    return made


def show(made: Table) -> None:
    """Print a table; one that is wider than the screen, or than a pipe's 80 columns, is never cut."""
    screen = console()
    wanted = screen.measure(made, options=screen.options.update(width=WIDEST)).maximum
    (screen if wanted <= screen.width else console(width=wanted)).print(made)


class Progress:
    """A bar on a terminal; silent without one."""

    def __init__(self, bar: Callable[[float, str], None] | None = None) -> None:
        self._bar = bar

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal that shows it."""
        return self._bar is not None

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount` units; `note`, or the one before it, is shown behind it."""
        if self._bar is not None:
            self._bar(amount, note)


class Lines(Progress):
    """A line in the log now and then, where there is no terminal: how far it is and how long the rest takes."""

    def __init__(self, description: str, total: float | None, unit: str, start: float = 0) -> None:
        super().__init__()
        self._description, self._total, self._unit = description, total, unit
        self._first = self._done = start
        self._note = ""
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount` units, and say so when the last line is `SECONDS_BETWEEN_LINES` old."""
        self._done, self._note, now = self._done + amount, note or self._note, time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            logger.info("%s", "  ".join(filter(None, (self._place(), self._note, self._rest(now)))))

    def _place(self) -> str:
        unit = "" if self._unit == "bytes" else f" {self._unit}"
        if not self._total:
            return f"{self._description} {self._amount(self._done)}{unit}"
        share = f"{100 * self._done / self._total:.0f} %"
        return f"{self._description} {self._amount(self._done)}/{self._amount(self._total)}{unit} ({share})"

    def _amount(self, value: float) -> str:
        from rich.filesize import decimal

        return decimal(int(value)) if self._unit == "bytes" else f"{value:,.0f}"

    def _rest(self, now: float) -> str:
        if not self._total or self._done <= self._first:
            return ""
        return f"{clock((now - self._start) / (self._done - self._first) * (self._total - self._done))} left"


def clock(seconds: float) -> str:
    """Seconds as a clock shows them: `1:12`, `4:03:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress(
    description: str,
    total: float | None,
    unit: str = "steps",
    start: int = 0,
    is_wanted: bool = True,
    has_lines: bool = True,
) -> Iterator[Progress]:
    """Show how far the block is, if it is wanted (by one rank of many): a bar on a terminal, else lines in the log.

    A bar of `unit` bytes has sizes and speed, and stays when it is done; others are wiped. Without `has_lines` the
    caller has words of its own for the log.
    """
    if not is_wanted or not sys.stderr.isatty() or _SHOWN:
        speaks = is_wanted and has_lines and not _SHOWN
        yield Lines(description, total, unit, start) if speaks else Progress()
        return
    from rich import progress as rich

    columns: list[rich.ProgressColumn] = [rich.TextColumn("{task.description}", markup=False), rich.BarColumn()]
    if unit == "bytes":
        columns += [rich.DownloadColumn(), rich.TransferSpeedColumn()]
    elif total is None:  # rich would show `120/?`
        columns += [rich.TextColumn("{task.completed:,.0f}", markup=False), rich.TextColumn(unit, markup=False)]
    else:
        columns += [rich.MofNCompleteColumn(), rich.TextColumn(unit, markup=False)]
    columns += [rich.TimeRemainingColumn()] if total is not None else [rich.TimeElapsedColumn()]
    columns += [rich.TextColumn("{task.fields[note]}", markup=False)]
    with rich.Progress(*columns, console=console(stderr=True), transient=unit != "bytes") as bar:
        task = bar.add_task(_cell(description), total=total, completed=start, note="")

        def advance(amount: float, note: str) -> None:
            bar.update(task, advance=amount, note=_cell(note) or bar.tasks[0].fields["note"])

        _SHOWN.append(description)
        try:
            yield Progress(advance)
        finally:
            _SHOWN.pop()


_SHOWN: list[str] = []  # a terminal has room for one bar


class LogFormatter(logging.Formatter):
    """Log lines, exceptions in them included, without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return literal(redact(super().format(record)))


def log_to_screen(*loggers: logging.Logger) -> None:
    """Send log lines to standard error, with the time of day."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(logging.INFO)


@contextmanager
def safe_streams() -> Iterator[None]:
    """While the block runs, nothing reaches standard output or error with a secret in it, whichever library says it."""
    with redirect_stdout(_SafeStream(sys.stdout)), redirect_stderr(_SafeStream(sys.stderr)):
        yield


class _SafeStream:
    """A text stream that redacts what is written to it; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text) if len(text) > 1 else text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cell(text: str) -> str:
    """Text for one place on the screen: headers break lines on purpose, nothing else does."""
    return literal(redact(text), keep="\n")


def _is_hidden(character: str) -> bool:
    return character in TURNS or unicodedata.category(character) in ESCAPED_CATEGORIES


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown_command(*words: str) -> str:
    """The words of a command as a shell takes them: in quotes where a blank or a sign would mean something else."""
    return shlex.join(redact(word) for word in words)
