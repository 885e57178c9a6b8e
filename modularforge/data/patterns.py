"""Patterns such as ``code/**/*.py`` as the files they match, as shell and Python read them.

`*` stays within one part of a path, `**` is any number of folders, hidden files and folders are left out unless the
pattern names them, and a part that exists as it is written is no pattern. Links are followed; each folder is entered
once below a `**`, so that loops end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from checkpoints import paths


def is_pattern(location: str) -> bool:
    """Whether a path or URL is written as a pattern; what `?`, `*` and `[` mean in the query of a web address."""
    signs = "*[" if is_web(location) else "*?["
    return any(sign in file_part(location) for sign in signs)


def is_web(url: str) -> bool:
    """Whether a URL is a web address, which may have a query."""
    return url.lower().startswith(("http://", "https://"))


def file_part(url: str) -> str:
    """A URL without what does not belong to the file's name: a web address's query, the archive a file lies in."""
    return re.split("[?#]", url, maxsplit=1)[0] if is_web(url) else url.removesuffix(_archive(url))


def match_local(pattern: str) -> list[str]:
    """Files of this machine that a pattern matches, sorted; raises OSError where a folder cannot be read."""
    if paths.local_path(pattern).exists():
        return [pattern]
    first, *parts = paths.local_path(pattern).parts
    folder, parts = (Path(first), parts) if os.path.isabs(first) else (Path(), [first, *parts])
    found = sorted({str(path) for path in _below(folder, parts)})
    return [f"./{name}" if name.startswith("~") else name for name in found]


def match_remote(pattern: str) -> list[str]:
    """The same of an object store or another file system of fsspec, as URLs."""
    filesystem, path = paths.filesystem(pattern)
    if filesystem.exists(path):
        return [pattern]
    parts = _literal_brackets(filesystem, path.split("/"))
    found = filesystem.glob("/".join(parts), detail=True)
    names = sorted(name for name, entry in found.items() if entry["type"] == "file" and _fits(name.split("/"), parts))
    return [filesystem.unstrip_protocol(name) + _archive(pattern) for name in names]


def _archive(url: str) -> str:
    """`::b.zip` of `zip://a.txt::b.zip`; empty for paths and for keys in which `::` is text."""
    sign, rest = url.partition("::")[1:]
    return sign + rest if "://" in url and url.partition("://")[0] not in ("file", *paths.UNCHAINED) else ""


def _below(folder: Path, parts: list[str]) -> Iterator[Path]:
    head, *rest = parts
    if head == "**":
        for inner in _folders(folder, set()):
            yield from _below(inner, rest or ["*"])
        return
    is_literal = not is_pattern(head) or os.path.lexists(folder / head)
    for path in [folder / head] if is_literal else _entries(folder, head):
        if rest and path.is_dir():
            yield from _below(path, rest)
        elif not rest and path.is_file():
            yield path


def _folders(folder: Path, entered: set[str]) -> Iterator[Path]:
    """A folder and all below it that are not hidden, each once: real ones before those that links lead to."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    yield folder
    inner = [path for path in _entries(folder, "*") if path.is_dir()]
    for path in sorted(inner, key=lambda path: (path.is_symlink(), path.name)):
        yield from _folders(path, entered)


def _entries(folder: Path, part: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return [folder / name for name in os.listdir(folder) if _part_fits(name, part)]


def _part_fits(name: str, part: str) -> bool:
    return fnmatchcase(name, part) and (not name.startswith(".") or part.startswith("."))


def _fits(names: list[str], parts: list[str]) -> bool:
    """Whether the parts of a path fit those of a pattern; what fsspec matched may still be hidden."""
    if parts == ["**"]:
        return not any(name.startswith(".") for name in names)
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (not names[0].startswith(".") and _fits(names[1:], parts))
    return (names[0] == parts[0] or _part_fits(names[0], parts[0])) and _fits(names[1:], parts[1:])


def _literal_brackets(filesystem: Any, parts: list[str]) -> list[str]:
    """The parts of a pattern, brackets escaped in those that exist as they are written, and `**` alone in its part."""
    done: list[str] = []
    for place, part in enumerate(parts):
        if "[" in part and filesystem.exists("/".join([*parts[:place], part])):
            done.append(part.replace("[", "[[]"))
        else:
            done.append(part if part == "**" else re.sub(r"\*\*+", "*", part))
    return done
