"""What `python -m launcher` and its subcommands do with a run, on Slurm or on this machine."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints import paths
from checkpoints.screen import shown_command
from launcher.allocation import LOCAL
from launcher.events import merge_events, read_all_events
from launcher.layout import folder_name, run_path, stored_log_url, work_folder
from launcher.lock import submission_lock
from launcher.preflight import fingerprint_of, preflight
from launcher.processes import LocalLauncher, stop_here, stop_one_here
from launcher.record import Record, beside, check_same_run, load_record, new_record, require_record, save_record
from launcher.report import describe as describe_report
from launcher.report import end_report, kept_report
from launcher.sbatch import comment_of, job_names
from launcher.slurm import SlurmError, queue, run_slurm
from launcher.status import GOING_ON, Row, describe, is_going_on, is_success, known_status, read_status
from launcher.submit import Submitter
from launcher.tasks import MERGED, Task, build_groups, build_tasks, kept_from_starting
from launcher.trust import check_commands, is_own_folder, require_open_places, require_readable_settings
from modularforge.config import Config
from modularforge.errors import ConfigError, UserError
from modularforge.pipeline import JobName, checkpoint_url, job_named, stage_url

Say = Callable[[str], None]
logger = logging.getLogger(__name__)
FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS, POLL_GROWTH = 2.0, 60.0, 1.5
CANCEL_SECONDS = 120.0
LAST_WORDS_SECONDS = 5.0
LOG_SECONDS = 0.5
LISTED = 8  # jobs that a sentence names
ALIVE = ("committed", *GOING_ON)


def launch(config: Config, say: Say, new_run: bool = False, check: bool = True) -> Config:
    """Submit what is missing of the run to Slurm, or attach to one that needs nothing; returns its settings."""
    config = chosen_run(config, new_run)
    require_readable_settings(config)
    record = load_record(config)
    if record:
        check_same_run(config, record)
    config = with_its_folder(config, record)
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
    config = with_its_folder(config, load_record(config))
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


def with_its_folder(config: Config, record: Record | None) -> Config:
    """With the work folder that the record names, where it stands here and no other place is given.

    A run that is started again, from another folder, has its logs, scripts and code in one place.
    """
    folder, given = Path(record.work_folder if record else ""), config.cluster.work_dir
    is_elsewhere = folder.name == folder_name(run_path(config)) and folder != work_folder(config)
    if not is_elsewhere or (given and Path(given).is_absolute()) or not is_own_folder(folder):
        return config
    logger.info("logs, scripts and code go on in %s, where the run has them", folder)
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"work_dir": str(folder.parent)})})


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
    """The record of the run at `output_dir` and the settings it was started with.

    Of one that people started with the scripts in slurm/, the settings given and a record without submissions.
    """
    record = load_record(config)
    if record is None and read_all_events(config):
        return config, new_record(config)
    record = record or require_record(config)
    settings = record.settings()
    # The folder may have been moved or copied since.
    return settings.model_copy(update={"output_dir": config.output_dir}), record


def cancel_one(config: Config, what: str, say: Say) -> None:
    """Stop one job of the run and what cannot start without it; the others go on."""
    config, record = recorded(config)
    name = _task_named(config, what).name
    if record.is_local:
        if not stop_one_here(config, record, name):
            raise ConfigError(f"{name} must be running to be cancelled, but is not; see `{_next(config, 'status')}`")
        say(f"{name}: asked to stop; it saves its state, and `{_next(config, 'resume')}` continues it")
        rows = {row.task: row for row in read_status(config, record)}
        _say_what_follows(config, rows, name, _kept_from_starting(config, rows, name), say)
        return
    rows = {row.task: row for row in read_status(config, record)}
    if rows[name].state not in GOING_ON:
        raise ConfigError(f"{name} must be going on to be cancelled, but is {rows[name].state}; nothing was done")
    waiting = _kept_from_starting(config, rows, name)
    # Assembly waits for the end of experts, however they end: it would start, and fail. Arrays wait for success.
    for other in [*reversed([other for other in waiting if JobName.parse(other).index is None]), name]:
        run_slurm("scancel", rows[other].job)
    say(f"{name}: cancelled {rows[name].job}; `{_next(config, 'resume')}` continues it")
    _say_what_follows(config, rows, name, waiting, say)


def _kept_from_starting(config: Config, rows: dict[str, Row], name: str) -> list[str]:
    """The jobs that wait and cannot start without this one."""
    alive = {task for task, row in rows.items() if row.state in ALIVE}
    found = kept_from_starting(build_tasks(config), name, alive, config.needed_experts)
    return [task for task in found if rows[task].state in ("pending", "requeued")]


def _say_what_follows(config: Config, rows: dict[str, Row], name: str, waiting: list[str], say: Say) -> None:
    if not waiting:
        return
    listed = ", ".join(waiting[:LISTED]) + (" …" if len(waiting) > LISTED else "")
    say(f"{listed}: cannot start without {name}; the same command submits what is missing")
    group = JobName.parse(name).stage
    others = sum(row.stage == group and row.state in ALIVE for row in rows.values() if row.task != name)
    if group in MERGED and others:
        where = "" if all(row.job.startswith(LOCAL) for row in rows.values() if row.job) else " --cluster"
        say(
            f"to go on without {name}: `{_next(config, 'launch')}{where} --set cluster.min_experts={others}`, then "
            "cancel it again"
        )


def rerun(config: Config, what: str, say: Say) -> None:
    """Make one finished expert, branch or baseline again, and what was made of it, as the run was last started."""
    config, record = recorded(config)
    task = _task_named(config, what)
    if not (task.is_training and task.is_worker) and not task.is_merge:
        raise ConfigError(
            f"rerun must name an expert or a baseline, but {task.name} is none: everything is made of it; start "
            "another run with --new-run"
        )
    rows = {row.task: row for row in read_status(config, record)}
    if going := [name for name in (task.name, "assemble", "evaluate") if name in rows and is_going_on([rows[name]])]:
        raise ConfigError(
            f"{', '.join(going)} must have ended before {task.name} is made again, but has not; wait, or "
            f"`{_next(config, 'cancel')}`"
        )
    for url in _made_of(config, task):
        if paths.exists(url) or paths.list_folder(url):
            paths.remove(url)
            say(f"removed {url}")
    resume(config, say)


def _made_of(config: Config, task: Task) -> list[str]:
    """Artifacts and checkpoints of a task, behind those that were made of it: no model is left with a part missing."""
    after = ["evaluate", *(["calibrate", "assemble"] if task.group == "expert" else [])]
    own = [*(stage_url(config, name, task.index) for name in task.stages), checkpoint_url(config, task.name)]
    return [*(stage_url(config, name) for name in after), *own]


def _task_named(config: Config, what: str) -> Task:
    tasks = {task.name: task for task in build_tasks(config)}
    if (name := str(job_named(what))) not in tasks:
        raise ConfigError(f"the job must be one of {', '.join(tasks)[:300]}, but is {what!r:.80}; choose one of these")
    return tasks[name]


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
    wait, has_answered = FIRST_POLL_SECONDS, False
    while True:
        before, start = rows, time.monotonic()
        try:
            rows = read_status(config, record)
            has_answered = True
        except SlurmError as error:
            if not rows:
                logger.warning("Slurm not reachable from here (%s); this is what the store knows", error)
            elif has_answered:
                logger.warning("%s; it is asked again", error)
            rows = rows if has_answered else read_status(config, record, asks_slurm=False)
        yield rows
        if not is_going_on(rows):
            return
        same = [(row.task, row.state) for row in before] == [(row.task, row.state) for row in rows]
        wait = min(LONGEST_POLL_SECONDS, wait * POLL_GROWTH) if same else FIRST_POLL_SECONDS
        # Of ten thousand experts on an object store a look takes seconds: half of the time at most is spent asking.
        time.sleep(max(wait, time.monotonic() - start))
        _, record = recorded(config)


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
    say(final_report(config, rows))
    return is_success(rows)


def _wait_for_last_words(config: Config) -> None:
    """A job notes its end just after its commit."""
    config, _record = recorded(config)
    for _ in polls(LAST_WORDS_SECONDS):
        if all(events[-1]["event"] != "started" for events in read_all_events(config).values() if events):
            return


def final_report(config: Config, rows: list[Row]) -> str:
    """The end report, after the events of all jobs were merged; of a run that is whole, the one that it ended with."""
    config, record = recorded(config)
    ran = Counter(row.stage for row in rows if row.job)
    if is_success(rows) and (kept := kept_report(config, ran)):
        return describe_report(kept)
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
    rows = {row.task: row for row in known_status(config, record)}
    if wanted not in rows or not rows[wanted].log:
        known = ", ".join(name for name, row in rows.items() if row.log)
        raise ConfigError(f"logs must name a job that was submitted, but {what!r:.80} is none; there are {known:.300}")
    return Path(rows[wanted].log)


def tail(config: Config, what: str, follow: bool) -> Iterator[str]:
    """The log of a job from its beginning; with `follow` also what is added until the job has ended.

    Of one on another machine, what it left beside the run on an object store.
    """
    path, position, ended = find_log(config, what), 0, not follow
    wait = next_look = FIRST_POLL_SECONDS
    start, stored = time.monotonic(), b""
    while True:
        if path.exists():
            with open(path, errors="replace") as file:
                file.seek(position)
                yield file.read()
                position = file.tell()
        elif (found := _stored_log(config, what)) is not None:
            yield _new_lines(stored, found, path)
            stored = found
        elif ended:
            raise ConfigError(
                f"{path} must exist, but the job has not started, or its log is on another machine; see "
                f"`{_next(config, 'status')}`"
            )
        if ended:
            return
        time.sleep(LOG_SECONDS)
        if time.monotonic() - start > next_look:
            ended = not _is_live(config, what)
            wait = min(LONGEST_POLL_SECONDS, wait * POLL_GROWTH)
            next_look += wait


def _stored_log(config: Config, what: str) -> bytes | None:
    """The end of a log that the job itself keeps beside the run."""
    try:
        return paths.read_bytes(stored_log_url(config, str(job_named(what))))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _new_lines(before: bytes, now: bytes, path: Path) -> str:
    """What has come to the end of a log, of which earlier lines may have gone."""
    head = "" if before else f"(the last lines; the whole log is {path} where the job runs)\n"
    added = now[len(before) :] if now.startswith(before) else now
    return head + added.decode(errors="replace")


def _is_live(config: Config, what: str) -> bool:
    config, record = recorded(config)
    name = str(job_named(what))
    try:
        return is_going_on([row for row in read_status(config, record) if row.task == name])
    except SlurmError:
        rows = read_status(config, record, asks_slurm=False)
        return is_going_on([row for row in rows if row.task == name])
