"""What a record that others can write must not do: say what runs on the nodes.

The record of a run on an object store may have been written by anybody who can write there, and some of its settings
are commands.
"""

from __future__ import annotations

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.config import ClusterConfig, Config
from modularforge.errors import ConfigError

COMMANDS = ("setup", "python", "container", "sbatch_options", "pass_environment", "work_dir")


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
