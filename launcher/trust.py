"""Which settings start jobs: none with secrets, which no file may hold, and no commands out of a record of others.

Jobs read their settings from a file, so what they cannot do without is refused before they start. The record of a run
on an object store may have been written by anybody who can write there, and some of its settings are commands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from checkpoints import paths
from checkpoints.redact import has_secret, is_redacted, redact, redact_urls
from launcher.layout import folder_name, run_path
from launcher.tasks import build_tasks, is_finished
from modularforge.config import ClusterConfig, Config, SourceConfig
from modularforge.config_files import COMMANDS
from modularforge.errors import ConfigError
from modularforge.run import Run


def require_open_places(config: Config) -> None:
    """Raise ConfigError when the run or its data lies at a URL with a secret in it; touches no storage."""
    for name, place in (("output_dir", config.output_dir), ("data_dir", config.data_dir)):
        if place is not None and _is_lost(place):
            raise ConfigError(
                f"{name} must hold no password and no signed query where jobs are started, but is "
                f"{redact_urls(place):.80}, which every job must open and none is told; give credentials in variables "
                "(AWS_…, FSSPEC_…)"
            )


def require_readable_settings(config: Config) -> None:
    """Raise ConfigError when a job would need a password or a signature that stands in the settings themselves."""
    require_open_places(config)
    for line in config.cluster.setup:
        if is_redacted(line):
            raise ConfigError(
                f"cluster.setup must be a line as the shell needs it, but is {line!r:.80}, whose secret was not saved "
                "with the settings; give it again with --set, or let the line read an environment variable"
            )
    lost = [(source.name, place) for source in config.data.sources for place in _locations(source) if _is_lost(place)]
    if lost and not is_finished(Run(config), build_tasks(config)[0]):
        name, place = lost[0]
        raise ConfigError(
            f"data.sources must name secrets as environment variables for jobs, such as https://${{USER}}:${{PASSWORD}}"
            f"@host/x, because none are saved with the settings, but that of {name} is {redact_urls(place):.80}; write "
            "it so (on a cluster also in cluster.pass_environment), or run `modularforge prepare-data` first"
        )


def check_commands(given: Config, recorded: Config) -> None:
    """Raise ConfigError when a record on an object store holds commands that the settings given here do not.

    A `work_dir` in which this user made the run's folder is no such command: nobody else can have put it there.
    """
    usual = ClusterConfig()
    work = Path(recorded.cluster.work_dir or "", folder_name(run_path(recorded)))
    foreign = [
        f"cluster.{name}"
        for name in COMMANDS
        if getattr(recorded.cluster, name) not in (getattr(given.cluster, name), getattr(usual, name))
        and not (name == "work_dir" and is_own_folder(work))
    ]
    if foreign and not paths.is_local(recorded.output_dir):
        raise ConfigError(
            f"{', '.join(foreign)} in the record of {redact(recorded.output_dir)} must be what --config says, because "
            "it decides what runs on the nodes and others may write there; name the settings file of the launch"
        )


def is_own_folder(folder: Path) -> bool:
    """Whether it is there, by its whole name, and this user made it."""
    try:
        return folder.is_absolute() and folder.is_dir() and folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def _is_lost(location: str) -> bool:
    return has_secret(location) or is_redacted(location)


def _locations(source: SourceConfig) -> Iterator[str]:
    for found in (source.train, source.validation, source.test):
        yield from [found] if isinstance(found, str) else found or ()
