"""``python -m launcher``: the stages of the pipeline as local processes, or with ``--cluster`` as Slurm jobs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from checkpoints.commands import HELP_NAMES, Commands, version_option
from checkpoints.screen import say
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.exits import run_app
from modularforge.kept_code import keep_code
from modularforge.options import with_settings, with_settings_of_a_run

INDEX = typer.Argument(min=0, help="Its index, where STAGE does not say it.")
OF_THE_PROGRAM = ("-h", "--help", "--version", "--install-completion", "--show-completion")


class LaunchByDefault(Commands):
    """Without a subcommand, `launch` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `launch` before options that no subcommand precedes; a shell that completes is told the subcommands."""
        is_launch = (not args and not ctx.resilient_parsing) or (
            args and args[0].startswith("-") and args[0].partition("=")[0] not in OF_THE_PROGRAM
        )
        return list(super().parse_args(ctx, ["launch", *args] if is_launch else args))


app = typer.Typer(
    cls=LaunchByDefault,
    help=(
        "Run the whole pipeline, each stage as a job of its own: here, or with --cluster on Slurm.\n\n"
        "Without a subcommand the run is launched, or continued: what is finished is skipped. The other subcommands "
        "find their run by --output-dir, or by the --config it was launched with, on Slurm or here."
    ),
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
)
app.callback()(version_option)


@app.command()
@with_settings
def launch(
    settings: Config,
    cluster: Annotated[bool, typer.Option("--cluster", help="Submit the jobs to Slurm and return.")] = False,
    max_workers: Annotated[int | None, typer.Option(min=1, help="Experts that train side by side here.")] = None,
    new_run: Annotated[bool, typer.Option("--new-run", help="With other settings: a run beside the old one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; touch nothing.")] = False,
    preflight: Annotated[bool, typer.Option(help="Check Slurm, storage and a node before the first job.")] = True,
) -> None:
    """Run the pipeline (the default): finished stages are skipped, and the same command continues after a stop.

    Here, the backbone runs under torchrun when launcher.backbone_processes is more than one, a stop (Ctrl-C) saves the
    state of every job, and a failed expert stops no other. On a cluster, everything is submitted within seconds.
    """
    from launcher import runs

    if cluster and max_workers is not None:
        raise ConfigError(
            "--max-workers is for processes here and excludes --cluster; there, set cluster.array_throttle"
        )
    if dry_run:
        plan_of(runs.chosen_run(settings, new_run))
    elif cluster:
        runs.launch(settings, say, new_run, preflight)
    else:
        keep_code()
        runs.launch_here(_with_workers(settings, max_workers), say, new_run)


def _with_workers(settings: Config, max_workers: int | None) -> Config:
    if max_workers is None:
        return settings
    changed = settings.launcher.model_copy(update={"max_workers": max_workers})
    return settings.model_copy(update={"launcher": changed})


@app.command()
@with_settings
def plan(
    settings: Config,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Instead, how the run would go on GPUs that fail (extra `simulate`).")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=VALUE", help="For --simulate: gpus=1024, mfu=0.45 … Repeatable."),
    ] = None,
) -> None:
    """Print every script, the graph and the hours a launch would ask for; touches neither Slurm nor storage.

    With --simulate: time to result, goodput and lost GPU-hours beside one job of all GPUs, with failures as published.
    """
    if assume and not simulated:
        raise ConfigError("--assume says what --simulate takes for granted; give both, or neither")
    if simulated:
        from launcher.simulated_plan import describe_simulation

        say(describe_simulation(settings, assume or ()))
    else:
        plan_of(settings)


def plan_of(settings: Config) -> None:
    """Print the plan."""
    from launcher.plan import describe_plan

    say(describe_plan(settings))


@app.command()
@with_settings_of_a_run
def status(
    settings: Config,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again when it changes, to the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """How each job stands: pending and why, running, requeued, failed, committed; step, loss, checkpoint, log."""
    from launcher.runs import final_report, follow_status, recorded
    from launcher.status import TOLD, describe, is_going_on, where_it_is
    from launcher.status import as_json as rows_as_json

    keep_code()
    config, record = recorded(settings)
    before = ""
    for rows in follow_status(settings):
        text = json.dumps(rows_as_json(rows)) if as_json else describe(config, rows)
        if text != before:
            say(text)
        before = text
        if not watch:
            break
    if not as_json and any(row.state in TOLD for row in rows) and (where := where_it_is(record)):
        say(f"the run was {where}")
    if not as_json and not is_going_on(rows):
        say(f"\n{final_report(settings, rows)}")


@app.command()
@with_settings_of_a_run
def logs(
    settings: Config,
    stage: Annotated[str, typer.Argument(help="STAGE or STAGE/INDEX: backbone, expert/3; or a job: assemble.")],
    index: Annotated[int | None, INDEX] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
) -> None:
    """Print the log of a job."""
    from launcher.runs import tail

    for text in tail(settings, _job(stage, index), follow):
        say(text.replace("\r", "\n"), end="")  # bars of libraries go back to the start of their line


@app.command()
@with_settings_of_a_run
def cancel(
    settings: Config,
    stage: Annotated[str | None, typer.Argument(help="Only this job, such as expert/2 or expert 2.")] = None,
    index: Annotated[int | None, INDEX] = None,
) -> None:
    """Stop the jobs of the run, the last stage first, or one; what is committed stays, and `resume` continues."""
    from launcher import runs

    if stage is None:
        runs.cancel(settings, say)
    else:
        runs.cancel_one(settings, _job(stage, index), say)


@app.command()
@with_settings_of_a_run
def rerun(
    settings: Config,
    stage: Annotated[str, typer.Argument(help="An expert or a baseline: expert/2, expert 2, dense.")],
    index: Annotated[int | None, INDEX] = None,
) -> None:
    """Make one finished expert or baseline again, and what was made of it; all else stays."""
    from launcher import runs

    runs.rerun(settings, _job(stage, index), say)


def _job(stage: str, index: int | None) -> str:
    return stage if index is None else f"{stage}/{index}"


@app.command()
@with_settings_of_a_run
def resume(settings: Config) -> None:
    """Go on with what is missing of a run, on Slurm or here, with the settings that it was started with."""
    from launcher.runs import resume as resume_run

    resume_run(settings, say)


@app.command()
@with_settings_of_a_run
def wait(settings: Config) -> None:
    """Wait until the run has ended and print the end report; the exit code is 0 when all is committed, else 1."""
    from launcher.runs import wait_for_run

    if not wait_for_run(settings, say):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; exit codes are those of `modularforge`."""
    run_app(app)


if __name__ == "__main__":
    main()
