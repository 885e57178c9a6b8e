"""Finds runs by URL, by name below a base folder, by pattern, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatch

from checkpoints import paths
from checkpoints.redact import redact_urls
from modularforge.errors import UserError
from modularforge.observe.run import is_run

DEFAULT_BASE = "runs"
SEARCH_DEPTH = 4  # folders below the base: a study has STUDY/seed-0/RECIPE; deeper, listing a bucket takes minutes
SHOWN = 12


class RunNameError(UserError):
    """A run name that means none of the runs, or several."""


def choose_runs(
    names: Iterable[str], base: str = DEFAULT_BASE, *, every: bool = False, pattern: str | None = None
) -> list[str]:
    """URLs of the runs that are meant, each once; raises RunNameError that lists the candidates."""
    chosen = [resolve(name, base) for name in names]
    if every or pattern is not None:
        found = find_runs(base)
        kept = {name: url for name, url in found.items() if pattern is None or fnmatch(name, pattern)}
        if not kept:
            wish = f"a run that matches {pattern!r}" if pattern else "a run"
            raise RunNameError(f"{base} must hold {wish}, but {_among(found)}; name another --base-dir")
        chosen += kept.values()
    if not chosen:
        raise RunNameError(f"name a run, or give --all or --pattern; {_among(find_runs(base))} in {base}")
    return list(dict.fromkeys(chosen))


def resolve(name: str, base: str = DEFAULT_BASE) -> str:
    """The URL of one run, given as URL or path, or as a name or a part of one below the base folder."""
    if is_run(name):
        return name.rstrip("/")
    runs = find_runs(base)
    for matches in (
        [run for run in runs if run == name],
        [run for run in runs if run.rsplit("/", 1)[-1] == name],
        [run for run in runs if name in run],
    ):
        if len(matches) == 1:
            return runs[matches[0]]
        if matches:
            raise RunNameError(f"{name!r} must name one run in {base}, but {_among(matches)} match; write one in full")
    near = difflib.get_close_matches(name, runs, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "name its folder or URL, or give --base-dir"
    raise RunNameError(f"{name!r} must name a run, but is none, and {_among(runs)} in {base}; {hint}")


def find_runs(base: str) -> dict[str, str]:
    """URLs of all runs at and below a folder, by their names relative to it."""
    found = {
        paths.relative(url, base) or url.rstrip("/").rsplit("/", 1)[-1]: url for url in _search(base, SEARCH_DEPTH)
    }
    return dict(sorted(found.items()))


def short_names(urls: list[str]) -> dict[str, str]:
    """The shortest ends of the URLs that still tell them apart."""
    parts = {url: redact_urls(url).rstrip("/").split("/") for url in urls}
    for length in range(1, max(len(part) for part in parts.values()) + 1):
        names = {url: "/".join(part[-length:]) for url, part in parts.items()}
        if len(set(names.values())) == len(urls):
            return names
    return {url: url for url in urls}


def _search(url: str, depth: int) -> list[str]:
    if is_run(url):
        return [url]
    if depth == 0:
        return []
    names = [name for name in paths.list_folder(url) if not name.startswith(".")]
    return [run for name in names for run in _search(paths.join(url, name), depth - 1)]


def _among(names: Iterable[str]) -> str:
    """`there are a, b and 3 more`."""
    listed = list(names)
    if not listed:
        return "there is none"
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"there are {', '.join(listed[:SHOWN])}{more}" if len(listed) > 1 else f"there is {listed[0]}"
