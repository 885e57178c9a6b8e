"""The command line. Every command reads the same settings; torch is imported only inside the commands that compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from checkpoints.commands import HELP_NAMES, Commands, version_option
from checkpoints.screen import say, shown_command
from modularforge.config import Config
from modularforge.errors import ConfigError, UserError
from modularforge.experts_cli import app as experts_app
from modularforge.kept_code import keep_code
from modularforge.log import logger
from modularforge.options import with_lazy_settings, with_settings
from modularforge.pipeline import CLEANING, SHARED_WORK, STAGES, JobName, Stage, checkpoint_url, wanted_stages
from modularforge.run import Run

if TYPE_CHECKING:
    from modularforge.cost import Parts

app = typer.Typer(
    name="modularforge",
    help=(
        "Train one mixture-of-experts language model as many independent jobs.\n\n"
        "The stages are prepare-data, train (backbone, then experts), assemble and evaluate; run-all does them in "
        "turn. What is finished is never done again, so any command may be repeated after a stop."
    ),
    cls=Commands,
    context_settings=HELP_NAMES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.callback()(version_option)
app.add_typer(experts_app, name="experts")


PRODUCT = ("prepare-data", "backbone", "expert", "assemble")
"""The jobs that make the model; what other measured rows there are is what it is compared with."""
INDEX = typer.Option(help="Which one of the partitions' jobs, from 0.")


def _make(
    run: Run,
    job: str,
    indices: Iterable[int | None] | None = None,
    but: Container[str] = (),
    parts: Parts | None = None,
) -> None:
    """Make what a job makes, stage by stage; before all experts' last round, the rounds before.

    `parts` say where the whole run is, which this process makes alone.
    """
    keep_code()
    if job == "expert" and indices is None:
        for stage in wanted_stages(run.config):
            if stage.round:
                _make(run, stage.name, parts=parts)
    for stage in STAGES.values():
        own = stage.job_in(run.config) if parts is None else stage.job
        if own == job and stage.name not in but and not stage.is_off(run.config):
            for index in stage.indices(run.config) if indices is None else indices:
                _make_part(run, stage.name, index, parts)


def _make_part(run: Run, stage: str, index: int | None, parts: Parts | None) -> Any:
    if parts is None or run.find(run.url(stage, index)):
        return run.make(stage, index)
    done = _done_before(run, stage, index)
    logger.info(parts.line(stage, index, done))
    start = time.monotonic()
    made = run.make(stage, index)
    parts.took(stage, index, time.monotonic() - start, done)
    return made


def _done_before(run: Run, stage: str, index: int | None) -> float:
    """The share of a training's steps that its newest checkpoint has behind it."""
    from checkpoints import paths
    from checkpoints.training import STEP_NAME

    phase = STAGES[stage].phase
    if phase is None:
        return 0.0
    names = paths.list_folder(checkpoint_url(run.config, JobName(stage, index)))
    steps = [int(found[1]) for name in names if (found := STEP_NAME.fullmatch(name))]
    return min(1.0, max(steps, default=0) / max(1, phase(run.config).steps))


def add_jobs(jobs: typer.Typer, stages: Iterable[Stage]) -> None:
    """A command for each job of the table of stages, under torchrun too; but for those with options of their own."""
    for stage in stages:
        if (not stage.within or stage.apart) and stage.name not in ("assemble", "evaluate"):
            _add_job(jobs, stage)


def _add_job(jobs: typer.Typer, stage: Stage) -> None:
    job = stage.name

    def one(settings: Config) -> None:
        _make(Run(settings), job)

    def indexed(settings: Config, index: Annotated[int, INDEX]) -> None:
        _make(Run(settings), job, [index])

    command = indexed if stage.is_indexed else one
    command.__doc__ = HELP_OF_JOBS.get(job, f"Train the baseline `{job}`, as a job of its own.")
    if stage.round:
        command.__doc__ = (
            f"Train one expert through round {stage.round} of several."
            if stage.is_indexed
            else MERGES.format(stage.round)
        )
    jobs.command(job, rich_help_panel="Jobs", hidden=stage.round > 1 or stage.copies > 1)(with_settings(command))


MERGES = "Merge what experts share after round {} (experts.rounds; later rounds have such commands too)."
HELP_OF_JOBS = {
    "inventory": "Note which files several jobs clean (cluster.prepare_tasks, data.clean).",
    **{
        name: f"Clean one share of the text {'before' if row.copies == 0 else 'after'} copies are looked for "
        "(cluster.prepare_tasks)."
        if row.is_indexed
        else "Find copies among what several jobs have cleaned (cluster.prepare_tasks)."
        for name, row in STAGES.items()
        if name in CLEANING and name != "inventory"
    },
    "prepare-data": "Learn the tokenizer, write token files, and divide the documents among the experts.",
    "vocabulary": "Learn the tokenizer of text that several jobs prepare (cluster.prepare_tasks).",
    "tokenise": "Read and tokenise one share of the text (cluster.prepare_tasks).",
    "centres": "Fit clusters on a sample of the text (cluster.prepare_tasks, partition.method clustered).",
    "assign": "Assign the documents of one share of the text to clusters (cluster.prepare_tasks).",
    "backbone": "Train the backbone; with DDP: torchrun --nproc-per-node 2 -m modularforge backbone.",
    "expert": "Train one expert, alone, on its own partition; where it is trained in rounds, through the last.",
    "branch": "Train one branch of the BTX baseline.",
}


@app.command()
@with_settings
def train(
    settings: Config,
    only: Annotated[str | None, typer.Option(help="Run this training job alone, as the command of its name.")] = None,
    index: Annotated[
        int | None, typer.Option(help="Which expert or branch, from 0; goes with --only of these.")
    ] = None,
    skip_backbone: Annotated[bool, typer.Option("--skip-backbone", help="Train the experts only.")] = False,
) -> None:
    """Train the backbone, then all experts one after another.

    As separate jobs: `backbone` (with DDP: torchrun --nproc-per-node 2 -m modularforge backbone), then `expert --index
    K` on as many machines as there are experts.
    """
    known = [stage.name for stage in STAGES.values() if stage.phase and not stage.within and not stage.round]
    if only not in (None, *known):
        raise ConfigError(f"--only must be one of {', '.join(known)}, but is {only!r}; choose one of these")
    if (only is not None and STAGES[only].is_indexed) != (index is not None):
        raise ConfigError(
            "--only expert and --index K go together, as do --only branch and --index K; "
            "give both, or neither to train everything"
        )
    if only == "backbone" and skip_backbone:
        raise ConfigError("--only backbone and --skip-backbone exclude each other; give one of them")
    run = Run(settings)
    jobs = [only] if only else ["expert"] if skip_backbone else ["backbone", "expert"]
    for job in jobs:
        _make(run, job, None if index is None else [index])


@app.command()
@with_settings
def assemble(
    settings: Config,
    calibrate: Annotated[bool, typer.Option("--calibrate/--no-calibrate", help="Calibrate afterwards.")] = True,
) -> None:
    """Merge backbone and experts into one model folder, then calibrate it on validation data."""
    _make(Run(settings), "assemble", but=() if calibrate else ("calibrate",))


@app.command()
@with_settings
def evaluate(
    settings: Config,
    model: Annotated[str | None, typer.Option(help="Measure only this model folder, and write nothing.")] = None,
    harness: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of lm-eval to do as well. Repeatable.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(help="Of speech: measure on this test set alone, at a path or known by name.")
    ] = None,
) -> None:
    """Measure the models of a run side by side: perplexity or error rate per domain, routing; prints the table."""
    if on is not None and settings.task != "speech":
        raise ConfigError(f"--on must be left out unless task is speech, but task is {settings.task}; leave it out")
    if harness:
        wanted = settings.evaluation.model_copy(update={"harness": harness})
        settings = settings.model_copy(update={"evaluation": wanted})
    if model is None and on is None:
        _evaluate(Run(settings))
        return
    from modularforge.observe.evaluation import print_errors, print_harness, print_table
    from modularforge.stages.evaluate import chosen_model, harness_of_folder, measure_folder

    run = Run(settings)
    if settings.task == "speech":
        from modularforge.stages.evaluate_speech import measure_folder as measure_speech

        results = measure_speech(run, model or chosen_model(run).url, on)
        print_errors(results)
    elif harness and model and not run.find(run.url("prepare-data")):
        logger.info("there is no prepared text at %s, so that the tasks alone are done", run.url("prepare-data"))
        print_harness(harness_of_folder(settings, model))
        return
    else:
        assert model is not None
        results = measure_folder(run, model)
    print_table(results)


def _evaluate(run: Run, parts: Parts | None = None) -> None:
    """Train what the evaluation compares with and nobody else trains, measure, and print the table."""
    from modularforge.observe.evaluation import print_table
    from modularforge.stages.evaluate import where

    for stage in wanted_stages(run.config):
        if stage.is_measured and stage.job not in PRODUCT:
            _make(run, stage.job, parts=parts)
    print_table(_make_part(run, "evaluate", None, parts))
    say(where(run))


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
    run = Run(settings)
    skipped = dict(zip(PRODUCT, (skip_data, skip_backbone, skip_experts, skip_assembly), strict=True))
    left_out = [*SHARED_WORK, *(stage.name for stage in STAGES.values() if skipped.get(stage.job))]
    left_out += ["calibrate"] if skip_calibration else []
    left_out += [stage.name for stage in STAGES.values() if skip_evaluation and stage.job not in PRODUCT]
    parts = _announced(run, left_out)
    for job in [job for job, skip in skipped.items() if not skip]:
        _make(run, job, but=("calibrate",) if skip_calibration else (), parts=parts)
    if not skip_evaluation:
        _evaluate(run, parts)


def _announced(run: Run, left_out: Collection[str]) -> Parts:
    """Say what the run will cost here and what would be better, unless it is done; returns what tells of its parts."""
    from modularforge.advice import advice
    from modularforge.cost import Parts, describe_cost, this_machine

    if run.find(run.url("evaluate")):
        return Parts(run.config, skipped=left_out)
    machine = this_machine(run.config)
    for line in describe_cost(run.config, machine).splitlines():
        logger.info(line)
    for sentence in advice(run.config):
        logger.warning("advice: %s", sentence)
    return Parts(run.config, machine, left_out, measure=lambda: this_machine(run.config))


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
    keep_code()
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
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. Without it you are asked for one.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the continuation.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Choose among those that hold this share.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask as the chat template writes it; without --prompt if there is one."),
    ] = None,
) -> None:
    """Continue a text with a trained model, or talk with it; words appear as they come."""
    from modularforge.evaluation.conversation import conversation, talk
    from modularforge.evaluation.generation import Sampling, continue_texts, load_for_generation, show
    from modularforge.stored_models import stored_model

    if model is None:
        from modularforge.stages.evaluate import chosen_model

        model = chosen_model(Run(load_settings())).url
    loaded = load_for_generation(model)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if not prompt:
        talk(conversation(loaded, stored_model(model), chat), tokens, sampling)
        return
    if chat or len(prompt) == 1:
        for text in prompt:
            conversation(loaded, stored_model(model), bool(chat)).ask(text, tokens, sampling)
        return
    for text, following in zip(prompt, continue_texts(loaded, prompt, tokens, sampling), strict=True):
        show(text + following)


@app.command()
@with_lazy_settings
def transcribe(
    load_settings: Callable[[], Config],
    audio: Annotated[list[str], typer.Argument(metavar="AUDIO…", help="Recordings: paths, URLs or patterns.")],
    model: Annotated[
        str | None, typer.Option(help="Speech model: folder, URL or owner/name on the Hub; without it the run's.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The text prompt that it was trained with.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Length of a transcript at the most.")] = 64,
    encoder: Annotated[str | None, typer.Option(help="Where its encoder lies here: a folder, or on the Hub.")] = None,
    decoder: Annotated[str | None, typer.Option(help="Where its language model lies here.")] = None,
) -> None:
    """Write down what recordings say, with a model of the task speech."""
    from modularforge.speech.folder import parts_in
    from modularforge.speech.hub import placed, speech_folder
    from modularforge.speech.transcribe import transcribe_files

    if model is None:
        settings = load_settings()
        prompt = prompt or settings.speech.model.prompt
        folder = Run(settings).require("assemble").local_folder()
    else:
        folder = speech_folder(model)
    parts = placed(parts_in(folder), encoder, decoder)
    for text in transcribe_files(folder, audio, prompt, tokens, parts):
        say(text)


@app.command()
@with_lazy_settings
def route(
    load_settings: Callable[[], Config],
    prompt: Annotated[str, typer.Option(help="The text.")],
    model: Annotated[str | None, typer.Option(help="Model folder; without it the run's best model.")] = None,
) -> None:
    """Say which experts a text goes to, and which of its tokens speak for them."""
    from modularforge.observe.routes import show_routes

    if model is None:
        from modularforge.stages.evaluate import chosen_model

        model = chosen_model(Run(load_settings())).url
    show_routes(model, prompt)


@app.command()
def analyze(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run of task speech, or folder of one model.")],
    audio: Annotated[str | None, typer.Argument(metavar="AUDIO", help="Recording to listen to.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder or URL for the figures; a run has them in plots/.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Show what the gates of a speech model do: by layer, by domain, over training, and frame by frame of a recording.

    Prints tables and writes figures.
    """
    from modularforge.log import configure_logging
    from modularforge.observe.analyze import analyze as show

    configure_logging()
    show(target, audio, output)


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
@with_lazy_settings
def push(
    load_settings: Callable[[], Config],
    target: Annotated[str, typer.Argument(metavar="hf://OWNER/NAME", help="Where on the Hub; @BRANCH may follow.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder or artifact, of speech an expert too; without it the run's model.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="The card's licence, by the Hub's word: apache-2.0 …")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new model there is yours alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; ask the Hub nothing.")] = False,
) -> None:
    """Upload a model to the Hugging Face Hub (set HF_TOKEN), with a card of its origin and measured figures."""
    from modularforge.push import push as push_model

    push_model(load_settings, target, model, licence, private, dry_run)


@app.command("export-tokens")
@with_settings
def export_tokens(
    settings: Config, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of this machine.")]
) -> None:
    """Write the token files of prepared data and of its partitions as Megatron's .bin and .idx."""
    import itertools
    import shutil

    from checkpoints import paths
    from modularforge.data.corpus import SPLITS
    from modularforge.data.token_arrays import export_megatron
    from modularforge.stored_tokens import partition_rows, partition_tokens, token_file

    run = Run(settings)
    corpus, partitions = run.require("prepare-data"), run.require("partition")
    if paths.is_local(corpus.url):
        corpus.local_folder()  # compares hashes, of shards too, which are mapped as they are
    splits = (token_file(corpus, split) for split in SPLITS)
    parts = (partition_tokens(partitions, index) for index in range(len(partition_rows(partitions))))
    for name, documents, tokens in export_megatron(itertools.chain(splits, parts), folder):
        say(f"{name}: {documents:,} documents, {tokens:,} tokens")
    shutil.copyfile(corpus.local_file("tokenizer.json"), folder / "tokenizer.json")


@app.command()
@with_lazy_settings
def export(
    load_settings: Callable[[], Config],
    path: Annotated[str, typer.Argument(metavar="FILE.gguf", help="A new file of this machine.")],
    model: Annotated[str | None, typer.Option(help="Model folder or artifact; without it the run's model.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="F32, F16, BF16 or Q8_0 for matrices; without it as they are stored.")
    ] = None,
) -> None:
    """Write a model as one GGUF file for llama.cpp and what is built on it."""
    from modularforge.push import export as export_model

    export_model(load_settings, path, model, kind)


@app.command()
def wikisql(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="WikiSQL's data.tar.bz2: a path or URL.")],
    output: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL for the files of the three splits.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Write the questions, columns and SQL of WikiSQL's archive as JSON lines, for the preset `wikisql`."""
    from modularforge.data.wikisql import convert_wikisql

    for split, count in convert_wikisql(archive, output).items():
        say(f"{split}: {count} questions")


@app.command()
def init(
    place: Annotated[
        str, typer.Argument(metavar="FOLDER_OR_URL", help="Where the text lies; a folder in it a domain.")
    ],
    output: Annotated[str | None, typer.Option(help="File to write; without it, the folder's name and .yaml.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Look at text of your own and this machine, and write a settings file that fits both, with comments."""
    from modularforge.first_config import look_at, save, write_config
    from modularforge.log import configure_logging

    configure_logging()
    look = look_at(place)
    file = output or f"{look.name}.yaml"
    save(write_config(look, look.name), file)
    say(f"{file}: {look.describe()}\nnext: {shown_command('modularforge', 'run-all', '--config', file)}")


@app.command()
def settings(
    pattern: Annotated[
        str | None, typer.Argument(help="Only settings whose name or sentence has this text, such as `router`.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/settings.md has them.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="A JSON schema of settings files, for editors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Print every setting with its type, its default and what it does."""
    from modularforge import settings_page

    if schema and (pattern or markdown):
        raise ConfigError("--schema is of all settings and excludes PATTERN and --markdown; give it alone")
    say(settings_page.schema() if schema else settings_page.page(pattern, markdown))


@app.command()
@with_settings
def info(
    settings: Config,
    show_settings: Annotated[bool, typer.Option("--settings", help="Print the resolved settings as YAML.")] = False,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, such as 1,8: what each job needs on each of them.")] = "",
) -> None:
    """Print the sizes of backbone and assembled model, the length of the training, and what it costs here."""
    from modularforge.config_files import to_yaml
    from modularforge.info import describe
    from modularforge.memory import gpu_counts

    say(to_yaml(settings) if show_settings else describe(settings, gpu_counts(gpus)))


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
    band: Annotated[float, typer.Option(min=1.000001, help="They diverge where their ratio leaves 1/BAND…BAND.")] = 2.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    """Compare runs with the first one: differences with intervals, where curves diverge, what looks wrong in them.

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


add_jobs(app, STAGES.values())
