"""What `python -m launcher` and its subcommands do with a run, on Slurm or on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.screen import shown_command
from launcher.events import merge_events, read_all_events
from launcher.lock import submission_lock
from launcher.preflight import fingerprint_of, preflight
from launcher.processes import LocalLauncher, stop_here
from launcher.record import Record, beside, check_same_run, load_record, new_record, require_record, save_record
from launcher.report import describe as describe_report
from launcher.report import end_report
from launcher.sbatch import comment_of, job_names
from launcher.slurm import SlurmError, queue, run_slurm
from launcher.status import Row, describe, is_going_on, is_success, read_status
from launcher.submit import Submitter
from launcher.tasks import build_groups, build_tasks
from launcher.trust import check_commands, require_open_places, require_readable_settings
from modularforge.config import Config
from modularforge.errors import ConfigError, UserError
from modularforge.pipeline import job_named

Say = Callable[[str], None]
logger = logging.getLogger(__name__)
FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS, POLL_GROWTH = 2.0, 60.0, 1.5
CANCEL_SECONDS = 120.0
LAST_WORDS_SECONDS = 5.0
LOG_SECONDS = 0.5


def launch(config: Config, say: Say, new_run: bool = False, check: bool = True) -> Config:
    """Submit what is missing of the run to Slurm, or attach to one that needs nothing; returns its settings."""
    config = chosen_run(config, new_run)
    require_readable_settings(config)
    record = load_record(config)
    if record:
        check_same_run(config, record)
    with submission_lock(config):
        record = load_record(config) or new_record(config)
        submitter = Submitter(config, record, say)
        if check and record.checked != fingerprint_of(config) and submitter.is_needed():
            for note in preflight(config, record.run_id):
                say(note)
            record.checked = fingerprint_of(config)
        count = submitter.run()
    say(f"run {record.run_id} at {config.output_dir}: {_outcome(config, record, count)}")
    return config


def launch_here(config: Config, say: Say, new_run: bool = False) -> None:
    """Run what is missing as processes of this machine, to the end, and print the table of the evaluation."""
    config = chosen_run(config, new_run)
    launcher = LocalLauncher(config, build_tasks(config), say)
    launcher.run()
    say(launcher.output_of("evaluate"))


def resume(config: Config, say: Say) -> None:
    """Go on with a run where it was last started, on Slurm or here, with the settings it was started with."""
    submitted, record = recorded(config)
    check_commands(config, submitted)
    if record.is_local:
        launch_here(submitted, say)
    else:
        launch(submitted, say)


def chosen_run(config: Config, new_run: bool) -> Config:
    """The run to launch: at `output_dir`, or beside the one that lies there."""
    require_open_places(config)
    old = load_record(config) if new_run else None
    return beside(config, old) if old else config


def _outcome(config: Config, record: Record, count: int) -> str:
    if count:
        return f"{count} submission(s); nothing needs to stay here, `{_next(config, 'status')}` tells how it stands"
    if is_going_on(rows := read_status(config, record)):
        return "everything is submitted already\n" + describe(config, rows)
    return "finished; nothing to do"


def _next(config: Config, command: str) -> str:
    """What to type next about this run."""
    return shown_command("python", "-m", "launcher", command, "--output-dir", config.output_dir)


def recorded(config: Config) -> tuple[Config, Record]:
    """The record of the run at `output_dir` and the settings it was started with."""
    record = require_record(config)
    settings = record.settings()
    # The folder may have been moved or copied since.
    return settings.model_copy(update={"output_dir": config.output_dir}), record


def cancel(config: Config, say: Say) -> None:
    """Stop all jobs of the run, the last stage first, and wait until they have ended."""
    config, record = recorded(config)
    if record.is_local:
        running = stop_here(config, record, say)
    else:
        record = _withdraw(config, say)
        running = _live_jobs(record)
    left: list[str] = []
    for _, left in zip(polls(CANCEL_SECONDS), running, strict=False):
        if not left:
            say(f"all jobs have ended; `{_next(config, 'resume')}` continues from what is committed")
            return
    where = "ps" if record.is_local else "squeue"
    raise UserError(
        f"the jobs must end within {CANCEL_SECONDS:.0f} s, but {', '.join(left)} did not; look at them with {where}"
    )


def _withdraw(config: Config, say: Say) -> Record:
    """Take back every submission to Slurm: those that come to run all the same end at once."""
    with submission_lock(config):
        record = require_record(config)
        jobs = _jobs_by_group(record)
        for group in reversed(build_groups(build_tasks(config))):
            if group.name in jobs:
                run_slurm("scancel", *jobs[group.name])
                say(f"{group.name}: cancelled {', '.join(jobs[group.name])}")
        for item in record.submissions:
            item.withdrawn = True
        save_record(config, record)
    return record


def _live_jobs(record: Record) -> Iterator[list[str]]:
    """Jobs of the run in Slurm's queue, asked for again and again."""
    while True:
        yield [job for jobs in _jobs_by_group(record).values() for job in jobs]


def _jobs_by_group(record: Record) -> dict[str, list[str]]:
    """Jobs of the run in the queue, by their comments: also those of which a killed launcher never heard."""
    groups = {comment_of(record.run_id, item.key): item.group for item in record.submissions}
    found: dict[str, list[str]] = {}
    for job in queue(job_names(record.run_id, sorted(set(groups.values())))):
        if job.is_live and job.comment in groups and job.job not in found.setdefault(groups[job.comment], []):
            found[groups[job.comment]].append(job.job)
    return found


def follow_status(config: Config) -> Iterator[list[Row]]:
    """The status again and again, more slowly while nothing changes, until nothing goes on any more.

    Once it was seen, a Slurm that does not answer is waited for: controllers are restarted while runs last for days.
    """
    config, record = recorded(config)
    rows: list[Row] = []
    wait = FIRST_POLL_SECONDS
    while True:
        before = rows
        try:
            rows = read_status(config, record)
        except SlurmError as error:
            if not rows:
                raise
            logger.warning("%s; it is asked again", error)
        yield rows
        if not is_going_on(rows):
            return
        same = [(row.task, row.state) for row in before] == [(row.task, row.state) for row in rows]
        wait = min(LONGEST_POLL_SECONDS, wait * POLL_GROWTH) if same else FIRST_POLL_SECONDS
        time.sleep(wait)
        record = require_record(config)


def wait_for_run(config: Config, say: Say) -> bool:
    """Wait until the run has ended, tell what changes, print the end report; returns whether all is committed."""
    states: dict[str, str] = {}
    rows: list[Row] = []
    for rows in follow_status(config):
        for row in rows:
            if states.get(row.task) != row.state:
                say(f"{row.task}: {row.state}{f' ({row.reason})' if row.reason else ''}")
            states[row.task] = row.state
    _wait_for_last_words(config)
    say(final_report(config))
    return is_success(rows)


def _wait_for_last_words(config: Config) -> None:
    """A job notes its end just after its commit."""
    config, _record = recorded(config)
    for _ in polls(LAST_WORDS_SECONDS):
        if all(events[-1]["event"] != "started" for events in read_all_events(config).values() if events):
            return


def final_report(config: Config) -> str:
    """The end report, after the events of all jobs were merged."""
    config, record = recorded(config)
    merge_events(config, record.events())
    return describe_report(end_report(config, record.events()))


def polls(seconds: float, first: float = 0.2) -> Iterator[None]:
    """Go on at once, then in growing intervals, until the time is over."""
    end, wait = time.monotonic() + seconds, first
    while True:
        yield
        if time.monotonic() + wait > end:
            return
        time.sleep(wait)
        wait = min(LONGEST_POLL_SECONDS, wait * POLL_GROWTH)


def find_log(config: Config, what: str) -> Path:
    """The log of STAGE or STAGE/INDEX; raises ConfigError with the names there are."""
    config, record = recorded(config)
    wanted = str(job_named(what))
    rows = {row.task: row for row in read_status(config, record)}
    if wanted not in rows or not rows[wanted].log:
        known = ", ".join(name for name, row in rows.items() if row.log)
        raise ConfigError(f"logs must name a job that was submitted, but {what!r:.80} is none; there are {known:.300}")
    return Path(rows[wanted].log)


def tail(config: Config, what: str, follow: bool) -> Iterator[str]:
    """The log of a job from its beginning; with `follow` also what is added until the job has ended."""
    path, position, ended = find_log(config, what), 0, not follow
    wait = next_look = FIRST_POLL_SECONDS
    start = time.monotonic()
    while True:
        if path.exists():
            with open(path, errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        elif ended:
            raise ConfigError(f"{path} must exist, but the job has not started; see `{_next(config, 'status')}`")
        if ended:
            return
        time.sleep(LOG_SECONDS)
        if time.monotonic() - start > next_look:
            ended = not _is_live(config, what)
            wait = min(LONGEST_POLL_SECONDS, wait * POLL_GROWTH)
            next_look += wait


def _is_live(config: Config, what: str) -> bool:
    config, record = recorded(config)
    name = str(job_named(what))
    try:
        return is_going_on([row for row in read_status(config, record) if row.task == name])
    except SlurmError as error:
        logger.warning("%s; it is asked again", error)
        return True
