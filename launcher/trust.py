"""What settings must not do to their owner: leave passwords in the files of jobs, or run what others wrote.

Jobs read their settings from files on shared disks. The record of a run on an object store may have been written by
anybody who can write there, and some of its settings are commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from checkpoints import paths
from checkpoints.redact import SECRET_QUERY, redact
from modularforge.config import ClusterConfig, Config
from modularforge.errors import ConfigError

COMMANDS = ("setup", "python", "container", "sbatch_options", "pass_environment", "work_dir")
PASSWORD = re.compile(r"://[^/?#\s:@]*:[^/?#\s]*@")


def check_no_secrets(config: Config) -> None:
    """Raise ConfigError with the names of settings that hold a password or a signed query."""
    if names := list(_holders(config.model_dump(mode="json"), "")):
        raise ConfigError(
            f"{', '.join(names[:10])} must hold no password and no signed query where jobs are started, because their "
            "settings are written into files; give credentials in variables (AWS_…, FSSPEC_…), or fetch the file first"
        )


def check_commands(given: Config, recorded: Config) -> None:
    """Raise ConfigError when a record on an object store holds commands that the settings given here do not."""
    usual = ClusterConfig()
    foreign = [
        f"cluster.{name}"
        for name in COMMANDS
        if getattr(recorded.cluster, name) not in (getattr(given.cluster, name), getattr(usual, name))
    ]
    if foreign and not paths.is_local(recorded.output_dir):
        raise ConfigError(
            f"{', '.join(foreign)} in the record of {redact(recorded.output_dir)} must be what --config says, because "
            "it decides what runs on the nodes and others may write there; name the settings file of the launch"
        )


def _holders(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, str) and (PASSWORD.search(value) or SECRET_QUERY.search(value)):
        yield name
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from _holders(inner, f"{name}.{key}" if name else str(key))
