"""Sentences about settings that cannot be: for every mistake the name, what it must be, what it is, what to do.

What pydantic found becomes one ConfigError with a line per mistake. The length of the message is bounded, whatever the
input: values are cut, secrets in them are masked, and of many mistakes the first are listed and the rest are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from checkpoints.redact import redact
from modularforge.config import PATTERN_WISHES
from modularforge.errors import ConfigError

LISTED_MISTAKES = 20
LONGEST_SENTENCE = 600
SHOWN_CHARACTERS, READ_CHARACTERS = 80, 400
WISHES = {
    "too_short": "a list of at least {min_length} entries",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "model_type": "a section with settings of its own",
    "dict_type": "a section",
    "list_type": "a list",
    "string_type": "a text",
    "string_unicode": "a text in UTF-8",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
}
"""What people read instead of the names of pydantic's error types."""

WRONG_KINDS = ("string_type", "int_type", "float_type", "bool_type", "list_type", "dict_type", "model_type")
# What pydantic puts into a place to say which kind of a union it tried.
KIND_TRIED = re.compile(r"(constrained-)?(str|int|float|bool)|(list|literal)\[.*\]")
CLOCK = re.compile(r"(?:(\d{1,3})-)?(\d{1,4}):(\d\d):(\d\d)")
OTHER_NUMBERS = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|[0-9][0-9_]*)")
YES, NO = ("yes", "y", "on", "1", "true"), ("no", "n", "off", "0", "false")


def config_error(
    error: ValidationError, origin: str, unknown: Callable[[tuple[Any, ...]], str] = lambda place: "is unknown"
) -> ConfigError:
    """The error to raise; `unknown` says what is wrong with a name that no setting has, given its place."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors(include_url=False):
        groups.setdefault(_place(problem["loc"]), []).append(problem)
    listed = [line for group in list(groups.values())[:LISTED_MISTAKES] for line in _sentences(group, unknown)]
    count = max(len(listed), len(groups))
    rest = [f"and {count - LISTED_MISTAKES} more"] if count > LISTED_MISTAKES else []
    text = "\n".join(f"  {line}" for line in [*map(_cut, listed[:LISTED_MISTAKES]), *rest])
    return ConfigError(f"{origin} has {count} mistake(s):\n{text}")


def shown(value: Any) -> str:
    """A value as messages show it: cut, in one line, without secrets."""
    text = repr(value[:READ_CHARACTERS] if isinstance(value, str) else value)[:READ_CHARACTERS]
    return redact(text)[:SHOWN_CHARACTERS]


def _cut(sentence: str) -> str:
    """A sentence that names what somebody wrote without end: its beginning, and what to do."""
    return sentence if len(sentence) <= LONGEST_SENTENCE else f"{sentence[:400]} … {sentence[-190:]}"


def _sentences(group: list[Any], unknown: Callable[[tuple[Any, ...]], str]) -> Iterator[str]:
    """About the problems of one place: several where a union's kinds were tried, of which one may have been meant."""
    group = [problem for problem in group if problem["type"] not in WRONG_KINDS] or group
    first, name = group[0], _name(group[0]["loc"])
    if first["type"] == "value_error":
        yield from str(first["ctx"]["error"]).splitlines()
    elif first["type"] == "extra_forbidden":
        yield f"{name} {unknown(first['loc'])}"
    elif first["type"] == "missing":
        yield f"{name} must be set, but is missing; add it"
    else:
        wishes = " or ".join(dict.fromkeys(map(_wish, group)))
        yield f"{name} must be {wishes}, but is {shown(first['input'])}; {_remedy(name, group)}"


def _place(location: tuple[Any, ...]) -> tuple[str, ...]:
    """Where a problem is, without the kinds that were tried there."""
    return tuple(str(part) for number, part in enumerate(location) if not (number and KIND_TRIED.fullmatch(str(part))))


def _name(location: tuple[Any, ...]) -> str:
    name = ".".join(part[:SHOWN_CHARACTERS] for part in _place(location))
    return name if name.isprintable() and name else repr(name)


def _wish(problem: Any) -> str:
    context = problem.get("ctx", {})
    known = PATTERN_WISHES.get(context.get("pattern", "")) or WISHES.get(problem["type"])
    return known.format(**context) if known else str(problem["msg"]).removeprefix("Input should be ")


def _remedy(name: str, group: list[Any]) -> str:
    """What to write instead, where that can be told."""
    kinds, value = {problem["type"] for problem in group}, group[0]["input"]
    if "string_type" in kinds and (value is None or isinstance(value, int | float)):
        return "put it in quotes"
    written = str(value)[:READ_CHARACTERS].strip().lower()
    if "bool_type" in kinds and written in (*YES, *NO):
        return f"write {str(written in YES).lower()}"
    if kinds & {"int_type", "float_type"} and (number := _number_in(written, name)) is not None:
        return f"write {number}"
    return "change it"


def _number_in(text: str, name: str) -> int | None:
    """The number that somebody meant who wrote a clock time, or a number as other languages have them."""
    if match := CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        return total if name.endswith("seconds") else -(-total // 60) if name.endswith("minutes") else None
    if len(text) > 40 or not OTHER_NUMBERS.fullmatch(text):
        return None
    try:
        return int(text, 10 if text.lstrip("+-0_").isdigit() or not text.strip("+-0_") else 0)
    except ValueError:
        return None
