"""Seeded mutations of good inputs, for tests that allow a reader nothing but its own error.

`texts` breaks bytes as disks, editors and attackers do; `values` puts hostile values into good JSON or YAML data, which
gets past the parser and hits what reads the parsed value. The same seed gives the same inputs on every machine.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from typing import Any

# `make test` tries a thousand inputs a reader, `make test-slow` ten thousand (MODULARFORGE_FUZZ=10000).
FUZZ_INPUTS = int(os.environ.get("MODULARFORGE_FUZZ", "1000"))

TOKENS = [
    b"", b"\x00", b"\xff\xfe", b"\xed\xa0\xbd", b"\n", b"\r", b"\x1b[31m", b"{", b"}", b"[", b"]", b'"', b"'", b":",
    b",", b"null", b"true", b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 5000,
    b"18446744073709551616", b"0x10", b"2001-99-99", b"2001-02-30", b"!!int x", b"!!timestamp x",
    b"!!python/object:os.system", b"&a [*a]", b"*a", b"<<: *a", b"..", b"/etc/passwd", b"../../x", b"a\n/../../../x",
    b"C:\\x", b"\\ud83d", b"%n", b"%(x)s", b"{}", b"[/x]", b"$(id)", b"[" * 3000, b"{" * 3000, b'{"a":' * 3000,
    b"- " * 3000, b"a" * 70000,
]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "x", "0", "\x00", "\n", "\ud83d", "é", "a" * 5000, "..", "/", "/etc/passwd", "../../x", "a\n/../../x",
    "s3://x/y", "[/x]", [], {}, [[]], [None], ["x"], [1, 2], {"x": 1}, {"": ""}, [[[[[[]]]]]],
    {"a": {"b": {"c": {}}}},
]  # fmt: skip


def texts(seeds: list[bytes], count: int = FUZZ_INPUTS, seed: int = 0) -> Iterator[bytes]:
    """`count` broken copies of the good inputs `seeds`."""
    rng = random.Random(seed)
    for _ in range(count):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _break(content, rng)
        yield bytes(content)


def values(good: Any, count: int = FUZZ_INPUTS, seed: int = 0) -> Iterator[Any]:
    """`count` copies of nested lists and dictionaries with entries replaced, removed, renamed or added."""
    rng = random.Random(seed)
    for _ in range(count):
        value = copy.deepcopy(good)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = _replace(value, rng)
        yield value


def _break(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.choice((0, 1, 1, 2, 8, 64)))
    kind = rng.randrange(6)
    if kind == 0 and start < len(content):
        content[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[start:]
    elif kind == 2:
        del content[start:end]
    elif kind == 3:
        content[start:start] = content[start:end] * rng.choice((1, 2, 50))
    else:
        content[start:end] = rng.choice(TOKENS)


def _replace(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return copy.deepcopy(rng.choice(VALUES))
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\n", "..", "__metadata__", "a" * 300, "é"])] = holder.pop(key)
    elif kind == 2:
        holder[key] = copy.deepcopy(rng.choice(places)[0])  # another part of the same input
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every entry, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from _places(inner)
