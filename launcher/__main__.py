"""``python -m launcher``: the stages of the pipeline as local processes, experts side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.local import LocalLauncher
from launcher.tasks import build_tasks
from modularforge.config import Config
from modularforge.exits import run_app
from modularforge.options import with_settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@with_settings
def launch(
    settings: Config,
    max_workers: Annotated[int | None, typer.Option(min=1, help="Experts that train side by side.")] = None,
) -> None:
    """Run the whole pipeline on this machine, each stage as a process of its own; finished stages are skipped.

    The backbone runs under torchrun when launcher.backbone_processes is more than one. A stop (Ctrl-C) saves the state
    of every job; the same command continues. A failed expert stops no other.
    """
    if max_workers is not None:
        changed = settings.launcher.model_copy(update={"max_workers": max_workers})
        settings = settings.model_copy(update={"launcher": changed})
    launcher = LocalLauncher(settings, build_tasks(settings), typer.echo)
    launcher.run()
    log = launcher.folder / "evaluate.log"
    typer.echo(log.read_text(errors="replace"))


if __name__ == "__main__":
    run_app(app)
