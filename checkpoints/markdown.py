"""Text within Markdown: names and samples that somebody else wrote are shown as they are, and begin nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from checkpoints.redact import redact
from checkpoints.screen import literal

# Emphasis, code, links, tables, HTML and entities, formulas; an underscore within a word and a colon alone are plain.
SPECIAL = re.compile(r"[\\`*\[\]<>|~$&#]|(?<![^\W_])_|_(?![^\W_])|:(?=[\w+-]+:)")
LIST_MARK = re.compile(r"^(\d{0,9})([-+.)])(?=\s|$)")


def plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown would read as its own."""
    line = literal(redact(" ".join(text.split())), keep="")
    return LIST_MARK.sub(r"\1\\\2", SPECIAL.sub(r"\\\g<0>", line))


def code(text: str) -> str:
    """The text on one line as code: between more backticks than it holds in a row."""
    line = literal(redact(" ".join(text.split())), keep="").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> list[str]:
    """The lines of a table; cells are Markdown already. Columns from `numbers_from` on stand to the right."""
    marks = ["---:" if numbers_from is not None and place >= numbers_from else "---" for place in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]
