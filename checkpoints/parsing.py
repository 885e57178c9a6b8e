"""JSON that somebody else wrote: parsed strictly, so that whatever the bytes, the only failure is a ValueError.

For manifests, headers of weight files, indices, settings of models and records. Corpora have a reader of their own,
which is faster (`modularforge/data/formats.py`), and so have lines of events and metrics, of which a torn one is no
error (`modularforge/json_lines.py`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
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
    _check(value, text)
    return value


def parse_object(content: bytes | bytearray | str) -> dict[str, Any]:
    """The same for what must be an object (``{…}``)."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, {{…}}, but is {value!r:.60}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.80} is there twice in one object")
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


def _check(value: Any, text: str) -> None:
    """Refuse what is nested too deep, level by level, and text that cannot be encoded."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item) if isinstance(inner, list | dict)]
    if level:
        raise _too_deep()
    text.encode()  # half a surrogate pair: UnicodeEncodeError is a ValueError
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()


def _inside(item: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
