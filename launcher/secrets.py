"""Jobs read their settings from files on shared disks, so settings with a password in them start no jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from checkpoints.redact import SECRET_QUERY
from modularforge.config import Config
from modularforge.errors import ConfigError

PASSWORD = re.compile(r"://[^/?#\s:@]*:[^/?#\s]*@")


def check_no_secrets(config: Config) -> None:
    """Raise ConfigError with the names of settings that hold a password or a signed query."""
    if names := list(_holders(config.model_dump(mode="json"), "")):
        raise ConfigError(
            f"{', '.join(names[:10])} must hold no password and no signed query where jobs are started, because their "
            "settings are written into files; give credentials in variables (AWS_…, FSSPEC_…), or fetch the file first"
        )


def _holders(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, str) and (PASSWORD.search(value) or SECRET_QUERY.search(value)):
        yield name
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _holders(inner, f"{name}.{key}" if name else str(key))
