"""Locations of source files as the settings name them, and as they are opened.

Settings are saved beside every output, so a password or a signature in a URL is taken out of the saved copy. Where jobs
read that copy, `${NAME}` names an environment variable, and only here it becomes its value.
"""

from __future__ import annotations

import os
import re

from checkpoints import paths
from checkpoints.redact import is_redacted
from modularforge.errors import DataError

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def real_location(location: str) -> str:
    """The location with the values of the variables it names; raises DataError where it cannot be opened as it is.

    A path that exists as it is written names no variables.
    """
    if VARIABLE.search(location) and paths.is_local(location) and paths.local_path(location).exists():
        return location
    if is_redacted(location):
        raise DataError(
            f"data.sources must say how to open {location}, but its secret is not saved with the settings; give the "
            "URL again with --set, or name an environment variable in it, such as https://${USER}:${PASSWORD}@host/x"
        )
    return VARIABLE.sub(_value, location)


def _value(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise DataError(
            f"data.sources must name environment variables that are set, but ${{{match[1]}}} is not; set it, and on a "
            "cluster name it in cluster.pass_environment"
        )
    return value
