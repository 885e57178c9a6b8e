"""Tables by name that another package can extend with a Python entry point; what is not asked for is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from modularforge.errors import ConfigError


def find(group: str, own: Mapping[str, str], name: str, what: str) -> Any:
    """The object of this name: our `own` ("module:object") first, then those of installed packages' entry points.

    Raises ConfigError with the names that there are. `what` is what the message calls it: a setting, or such an object.
    """
    return entry(group, own, name, what).load()


def entry(group: str, own: Mapping[str, str], name: str, what: str) -> EntryPoint:
    """The same, not loaded yet: whether there is such an object is known without its imports."""
    if name in own:
        return EntryPoint(name, own[name], group)
    known = {point.name: point for point in entry_points(group=group)}
    if name not in known:
        names = ", ".join(sorted({*own, *known}))
        raise ConfigError(
            f"{what} must be one of {names}, but is {name!r:.60}; choose one of these, or install the package that "
            f"has it (entry points of the group {group})"
        )
    return known[name]
