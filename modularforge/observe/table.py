"""Tables for people: records in columns with names, and one table for a terminal, Markdown, plain text and the page.

A column is one entry: its title, the value it takes from a record, its format, and whether a terminal has room for it.
Nothing goes by the place of a column, so that one more changes nothing else. Numbers are written here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter
from typing import Any

from checkpoints import screen
from checkpoints.markdown import plain
from checkpoints.markdown import table as markdown_table

MISSING = "–"
Format = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """One column: `value` of a record in a `form`; None is a dash. Numbers stand to the right of all text columns."""

    title: str
    value: Callable[[Any], Any]
    form: Format = str
    is_text: bool = False
    on_screen: bool = True

    def cell(self, record: Any) -> str:
        """The text of a record's cell."""
        value = self.value(record)
        return MISSING if value is None else self.form(value)


@dataclass(frozen=True)
class Table:
    """Records in columns; `title` and `words` explain it where it is one of several."""

    columns: Sequence[Column]
    records: Sequence[Any]
    title: str = ""
    words: str = ""

    @property
    def header(self) -> list[str]:
        """The titles."""
        return [column.title for column in self.columns]

    @property
    def rows(self) -> list[list[str]]:
        """The cells of every record."""
        return [[column.cell(record) for column in self.columns] for record in self.records]

    @property
    def text_columns(self) -> int:
        """How many columns, the first ones, hold no numbers."""
        return sum(column.is_text for column in self.columns)

    def markdown(self) -> list[str]:
        """Lines of Markdown, in which names are nothing but text."""
        rows = [list(map(plain, row)) for row in self.rows]
        return markdown_table(list(map(plain, self.header)), rows, numbers_from=self.text_columns)

    def text(self) -> list[str]:
        """Lines of text: columns as wide as their widest cell, text to the left, numbers to the right."""
        cells = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sides = ["<" if column.is_text else ">" for column in self.columns]
        form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
        return ["  " + form.format(*row).rstrip() for row in cells]

    def show(self, marked: int | None = None) -> None:
        """Print on a terminal what of it has room there; the record `marked` is bold."""
        seen = Table([column for column in self.columns if column.on_screen], self.records)
        made = screen.table(
            [screen.breakable(screen.literal(title, keep=""), "\n") for title in seen.header],
            seen.rows,
            title=self.title,
            numbers_from=seen.text_columns,
            marked=marked,
            pad_edge=False,
            box=None,
        )
        screen.show(made)


def listing(
    header: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1, title: str = "", words: str = ""
) -> Table:
    """A table whose cells are text already, None for a dash."""
    columns = [Column(name, itemgetter(place), is_text=place < text_columns) for place, name in enumerate(header)]
    return Table(columns, list(rows), title, words)


def named(key: str) -> Callable[[tuple[str, Any]], Any]:
    """The value by its key of a record that is a name and a row; a dash where older rows have none."""
    return lambda record: record[1].get(key)


def of(*names: str) -> Callable[[tuple[str, Any]], Any]:
    """An attribute, or one of its own, of a record that is a name and an object; None where one on the way is None."""
    return lambda record: reduce(lambda value, name: None if value is None else getattr(value, name), names, record[1])


def name_column(title: str) -> Column:
    """The first column of tables whose records are a name and a row."""
    return Column(title, itemgetter(0), is_text=True)


def fixed(value: Any, digits: int = 4) -> str:
    """A number with so many decimals; JSON holds one that is not finite as text."""
    return f"{float(value):.{digits}f}"


def decimals(digits: int) -> Format:
    """The format of numbers with so many decimals."""
    return partial(fixed, digits=digits)


def signed(value: float, digits: int = 4) -> str:
    """A difference: with its sign."""
    return f"{float(value):+.{digits}f}"


def percent(value: float) -> str:
    """A share as whole per cent."""
    return f"{value:.0%}"


def count(value: int) -> str:
    """How many parameters, tokens or FLOPs: 1234567 as 1.23M, 1.5e9 as 1.5B."""
    # From 999.5 on three digits round up to the next unit, and would be written 1e+03 in this one.
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size and value >= 1000:
            return f"{value / size:.3g}{unit}"
    return str(value)


def number(value: float | None) -> str:
    """A value of any size where digits matter: five significant ones, or a dash."""
    return MISSING if value is None else f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.4e}"


def rough(value: float) -> str:
    """A value of any size where room matters, as on an axis: three digits, without exponent where it stays short."""
    return f"{value:,.0f}" if 10 <= abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `7 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
