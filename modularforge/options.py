"""The options that every command shares, in one place for all programs of the project."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from checkpoints import paths
from modularforge.config import Config
from modularforge.config_files import load_config, settings_of_run, usual_commands
from modularforge.log import configure_logging
from modularforge.ranks import is_quiet

DEFAULT_CONFIG = "configs/default.yaml"


def shared_options(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help=f"Settings file (YAML); without it the run's own, or {DEFAULT_CONFIG}."),
    ] = None,
    smoke_test: Annotated[
        bool, typer.Option("--smoke-test", help="The same path at tiny sizes: under a minute.")
    ] = False,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Prepared data: a folder or URL.")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", "-o", help="Root of the run: folder or URL.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting: backbone.steps=500. Repeatable."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Only its signature is used: the parameters that `with_settings` adds to a command."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Turn ``command(settings, …)`` into a typer command that also takes the shared options and builds the settings."""
    return _with_options(command, lambda load: load())


def with_settings_of_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """The same for a command that finds a run and takes what was recorded there: a pretrained model is not asked."""
    return _with_options(command, lambda load: load(asks_for_shape=False))


def with_lazy_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The same for ``command(load_settings, …)``, which may do without: it gets a function that builds them."""
    return _with_options(command, lambda load: load)


def settings_from(path: str | None, changes: Sequence[str], **given: Any) -> Config:
    """The settings of a file; of a run that is there and was named without one, its own."""
    output_dir, smoke_test = given["output_dir"], given["smoke_test"]
    own = settings_of_run(output_dir) if path is None and output_dir and not smoke_test else None
    usual = [] if own is None or paths.is_local(own) else usual_commands()
    return load_config(own or path or DEFAULT_CONFIG, [*usual, *changes], **given)


def _with_options(command: Callable[..., None], pass_on: Callable[[Callable[..., Config]], Any]) -> Callable[..., None]:
    shared = inspect.signature(shared_options).parameters
    own = list(inspect.signature(command).parameters.values())[1:]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {name: values.pop(name) for name in shared}
        configure_logging(quiet=is_quiet())
        load = functools.partial(
            settings_from,
            given["config"],
            given["changes"] or (),
            smoke_test=given["smoke_test"],
            data_dir=given["data_dir"],
            output_dir=given["output_dir"],
        )
        command(pass_on(load), **values)

    hints = {**typing.get_type_hints(shared_options, include_extras=True)}
    hints |= typing.get_type_hints(command, include_extras=True)
    names = [*(parameter.name for parameter in own), *shared]
    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in [*own, *shared.values()]
    ]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: hints[name] for name in names}
    return wrapper
