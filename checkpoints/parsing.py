"""JSON that somebody else wrote: parsed strictly, so that whatever the bytes, the only failure is a ValueError.

For manifests, headers of weight files, indices, settings of models and records. Corpora have a reader of their own,
which is faster (`modularforge/data/formats.py`).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 64  # ours are 8 deep at most; the limit is the same in every Python, whose own comes as a RecursionError


def parse_json(content: bytes | bytearray | str) -> Any:
    """The value in UTF-8 JSON; raises ValueError with a reason.

    Stricter than `json.loads`: a name that occurs twice in an object, numbers that are not finite, half surrogate pairs
    and nesting deeper than 64 are refused. A byte order mark is skipped.
    """
    text = content if isinstance(content, str) else bytes(content).decode("utf-8-sig")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_not_finite, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise _too_deep() from None
    _check(value)
    return value


def parse_object(content: bytes | bytearray | str) -> dict[str, Any]:
    """The same for what must be an object (``{…}``)."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, {{…}}, but is {value!r:.60}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} is there twice in one object")
        found[name] = value
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _integer(text: str) -> int | float:
    return int(text) if text != "-0" else -0.0  # as all readers of JSON but Python's; no length or offset is negative


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _check(value: Any) -> None:
    """Walk the value level by level: what is too deep, and text that cannot be encoded, is refused."""
    level, depth = [value], 0
    while level:
        depth += any(isinstance(item, list | dict) for item in level)
        if depth > MAX_DEPTH:
            raise _too_deep()
        for item in level:
            if isinstance(item, str):
                item.encode()  # half a surrogate pair: UnicodeEncodeError is a ValueError
        level = [inner for item in level for inner in _inside(item)]


def _inside(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return item if isinstance(item, list) else []


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
