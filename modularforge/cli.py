"""The command line. Every command reads the same settings; torch is imported only inside the commands that compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from checkpoints.screen import say
from modularforge.config import TRAINED_ON_ALL, Config
from modularforge.errors import ConfigError, UserError
from modularforge.experts_cli import app as experts_app
from modularforge.options import with_lazy_settings, with_settings

app = typer.Typer(
    name="modularforge",
    help=(
        "Train one mixture-of-experts language model as many independent jobs.\n\n"
        "The stages are prepare-data, train (backbone, then experts), assemble and evaluate; run-all does them in "
        "turn. What is finished is never done again, so any command may be repeated after a stop."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(experts_app, name="experts")


@app.command("prepare-data")
@with_settings
def prepare_data(settings: Config) -> None:
    """Learn the tokenizer, write token files, and divide the documents among the experts."""
    _prepare(settings)


def _prepare(settings: Config) -> None:
    from modularforge.stages import prepare

    prepare.run(settings)


@app.command()
@with_settings
def train(
    settings: Config,
    only: Annotated[
        str | None,
        typer.Option(help="Train the `backbone`, one `expert`, or a baseline: `dense`, `joint`, one `branch` of BTX."),
    ] = None,
    index: Annotated[
        int | None, typer.Option(help="Which expert or branch, from 0; goes with --only of these.")
    ] = None,
    skip_backbone: Annotated[bool, typer.Option("--skip-backbone", help="Train the experts only.")] = False,
) -> None:
    """Train the backbone, then all experts one after another.

    As separate jobs: --only backbone (with DDP: torchrun --nproc-per-node 2 -m modularforge train --only backbone),
    then --only expert --index K on as many machines as there are experts.
    """
    known = ("backbone", "expert", *TRAINED_ON_ALL, "branch", "btx")
    if only not in (None, *known):
        raise ConfigError(f"--only must be one of {', '.join(known)}, but is {only!r}; choose one of these")
    if (only in ("expert", "branch")) != (index is not None):
        raise ConfigError(
            "--only expert and --index K go together, as do --only branch and --index K; "
            "give both, or neither to train everything"
        )
    if only == "backbone" and skip_backbone:
        raise ConfigError("--only backbone and --skip-backbone exclude each other; give one of them")
    if only in (*TRAINED_ON_ALL, "branch", "btx"):
        _train_baseline(settings, only, index)
    if only in (None, "backbone") and not skip_backbone:
        _train_backbone(settings)
    if only in (None, "expert"):
        _train_experts(settings, range(settings.experts.count) if index is None else [index])


def _train_backbone(settings: Config) -> None:
    from modularforge.stages import backbone

    backbone.run(settings)


def _train_experts(settings: Config, indices: range | list[int]) -> None:
    from modularforge.stages import expert

    for index in indices:
        expert.run(settings, index)


def _train_baselines(settings: Config) -> None:
    """Train what the evaluation compares with and nobody else trains."""
    for name in TRAINED_ON_ALL:
        if name in settings.evaluation.baselines:
            _train_baseline(settings, name)
    if "btx" in settings.evaluation.baselines:
        for index in range(settings.experts.count):
            _train_baseline(settings, "branch", index)


def _train_baseline(settings: Config, name: str, index: int | None = None) -> None:
    from modularforge.runners import RUNNERS

    RUNNERS[name](settings, *([] if index is None else [index]))


@app.command()
@with_settings
def assemble(
    settings: Config,
    calibrate: Annotated[bool, typer.Option("--calibrate/--no-calibrate", help="Calibrate afterwards.")] = True,
) -> None:
    """Merge backbone and experts into one model folder, then calibrate it on validation data."""
    _assemble(settings, calibrate)


def _assemble(settings: Config, calibrate: bool) -> None:
    from modularforge.stages import assemble as assemble_stage

    assemble_stage.run(settings)
    if calibrate:
        from modularforge.stages import calibrate as calibrate_stage

        calibrate_stage.run(settings)


@app.command()
@with_settings
def evaluate(
    settings: Config,
    model: Annotated[str | None, typer.Option(help="Measure only this model folder, and write nothing.")] = None,
) -> None:
    """Measure the models of a run side by side: perplexity per domain, routing, samples; prints the table."""
    _evaluate(settings, model)


def _evaluate(settings: Config, model: str | None = None) -> None:
    from modularforge.observe.evaluation import print_table
    from modularforge.stages import evaluate as evaluate_stage

    if model is not None:
        print_table(evaluate_stage.measure_folder(settings, model))
        return
    _train_baselines(settings)
    print_table(evaluate_stage.run(settings))
    say(evaluate_stage.where(settings))


@app.command("run-all")
@with_settings
def run_all(
    settings: Config,
    skip_data: Annotated[bool, typer.Option("--skip-data", help="Take the prepared data as it is.")] = False,
    skip_backbone: Annotated[bool, typer.Option("--skip-backbone", help="Take the backbone as it is.")] = False,
    skip_experts: Annotated[bool, typer.Option("--skip-experts", help="Take the experts as they are.")] = False,
    skip_assembly: Annotated[bool, typer.Option("--skip-assembly", help="Assemble and calibrate nothing.")] = False,
    skip_calibration: Annotated[bool, typer.Option("--skip-calibration", help="Do not calibrate.")] = False,
    skip_evaluation: Annotated[bool, typer.Option("--skip-evaluation", help="Measure nothing.")] = False,
) -> None:
    """Prepare data, train backbone and experts, assemble, calibrate and evaluate; finished stages are skipped."""
    if not skip_data:
        _prepare(settings)
    if not skip_backbone:
        _train_backbone(settings)
    if not skip_experts:
        _train_experts(settings, range(settings.experts.count))
    if not skip_assembly:
        _assemble(settings, not skip_calibration)
    if not skip_evaluation:
        _evaluate(settings)


@app.command()
def study(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Study file (YAML), such as configs/study-quick.yaml.")
    ],
    only: Annotated[list[str] | None, typer.Option(help="Measure only this variant. Repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed of the study. Repeatable.")] = None,
    split: Annotated[str, typer.Option(help="`validation` to choose by, `test` for the final table.")] = "validation",
    cluster: Annotated[bool, typer.Option("--cluster", help="Train the runs of all recipes on Slurm first.")] = False,
    smoke_test: Annotated[bool, typer.Option("--smoke-test", help="The same path at tiny sizes.")] = False,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", "-o", help="Root of the study: folder or URL.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting of all recipes.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Train and measure many variants of the method with shared work done once; writes one table of all of them.

    What is finished is never done again: repeat the command after a stop, or with more variants and seeds in the file.
    """
    from modularforge.log import configure_logging

    configure_logging()
    if split not in ("validation", "test"):
        raise ConfigError(f"--split must be validation or test, but is {split!r}; choose one of these")
    from modularforge.study.measure import Split
    from modularforge.study.runs import Runs, train_on_cluster
    from modularforge.study.study import choose_seeds, choose_variants, run_study
    from modularforge.study.study_file import load_study

    runs = Runs(load_study(config, output_dir), smoke_test, tuple(changes or ()))
    chosen: Split = "test" if split == "test" else "validation"
    if cluster:
        train_on_cluster(runs, choose_variants(runs, chosen, only or ()), choose_seeds(runs, seed or ()))
    say(run_study(runs, chosen, only or (), seed or ()))


@app.command()
@with_lazy_settings
def generate(
    load_settings: Callable[[], Config],
    model: Annotated[str | None, typer.Option(help="Model folder; without it the run's best model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without it you are asked for one.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Choose among those that hold this share.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text.")] = 0,
) -> None:
    """Continue a text with a trained model."""
    from modularforge.evaluation.generation import Sampling, continue_text, load_for_generation, show, talk

    if model is None:
        from modularforge.stages.evaluate import chosen_model

        model = chosen_model(load_settings()).url
    loaded = load_for_generation(model)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if prompt is None:
        talk(loaded, tokens, sampling)
    else:
        show(prompt + continue_text(loaded, prompt, tokens, sampling))


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name on the Hub (name@revision), folder, or URL.")],
    output: Annotated[str | None, typer.Option(help="Folder or URL; without it, the cache.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte with the recorded hashes; fetch what is damaged again.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Bring a pretrained model and its tokenizer here, whole or not at all, for `model.pretrained`.

    A whole copy that is there already is used, also without a network.
    """
    from modularforge.log import configure_logging
    from modularforge.pretrained.fetch import fetch as fetch_model

    configure_logging()
    say(fetch_model(model, output, verify).url)


@app.command()
@with_settings
def info(
    settings: Config,
    show_settings: Annotated[bool, typer.Option("--settings", help="Print the resolved settings as YAML.")] = False,
) -> None:
    """Print the sizes of backbone and assembled model, FLOPs per token, and the length of the training."""
    from modularforge.info import describe
    from modularforge.settings import to_yaml

    say(to_yaml(settings) if show_settings else describe(settings))


@app.command()
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Folder, URL, or name below --base-dir.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All runs below --base-dir.")] = False,
    pattern: Annotated[str | None, typer.Option(help="Runs whose name matches, for example 'wiki-*'.")] = None,
    base_dir: Annotated[str, typer.Option(help="Where runs are looked for: a folder or URL.")] = "runs",
    output: Annotated[str | None, typer.Option(help="Write there instead of into the run.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Write report.html and plots/*.png of runs, finished or not: curves, timeline, evaluation, routing, settings."""
    from modularforge.observe.discover import choose_runs
    from modularforge.observe.report import report_runs

    for line in report_runs(choose_runs(runs or [], base_dir, every=every, pattern=pattern), output):
        say(line)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN…", help="Two runs or more; the first is the reference.")
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder or URL for the plots, compare.txt and compare.json.")
    ] = None,
    base_dir: Annotated[str, typer.Option(help="Where runs are looked for: a folder or URL.")] = "runs",
    band: Annotated[float, typer.Option(min=1.000001, help="Curves part where their ratio leaves 1/BAND…BAND.")] = 2.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Compare runs with the first one: differences with intervals, where curves part, what looks wrong in them.

    Prints the report and writes it as compare.txt and compare.json, with a plot per metric and an overview.
    """
    from modularforge.observe.compare import compare_runs
    from modularforge.observe.discover import resolve

    say(compare_runs([resolve(name, base_dir) for name in runs], output, band))


@app.command()
@with_lazy_settings
def sanity(
    load_settings: Callable[[], Config],
    test: Annotated[str, typer.Option(help="m0 the model, m1 the data, m2 a short training, or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="The same checks at tiny sizes: under 10 seconds.")] = False,
) -> None:
    """Check model, data and training before spending GPU hours: exit 0 when all is well, 1 with each cause if not."""
    from modularforge.sanity.checks import run_checks

    try:
        settings = load_settings()
    except UserError as error:  # settings that cannot be used are a finding too
        say(f"Settings\n  FAIL  {error}")
        raise typer.Exit(1) from error
    if not run_checks(settings, test, quick):
        raise typer.Exit(1)
