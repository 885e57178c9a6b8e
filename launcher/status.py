"""How each task of a run stands, from manifests, the jobs' own notes, and one squeue call; sacct is not asked."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.events import Event, Progress, progress_of_each, read_all_events
from launcher.layout import log_file, old_folder_name, run_path
from launcher.processes import jobs_here
from launcher.record import Record, Submission
from launcher.retry_policy import count_requeues
from launcher.sbatch import job_names
from launcher.slurm import QueuedJob, SlurmError, queue
from launcher.submit import live_tasks
from launcher.tasks import Task, build_groups, build_tasks, finished_tasks, unneeded_tasks
from modularforge.config import Config
from modularforge.pipeline import STAGES
from modularforge.run import Run

logger = logging.getLogger("modularforge")
GOING_ON = ("pending", "requeued", "running", "ending", "submitted", "started")
TOLD = ("submitted", "started")  # states of jobs that nobody here can ask Slurm about
# Names of the scripts in slurm/, which people submit by hand.
BY_HAND = ("train-backbone", "train-experts", "assemble")
# Of a large array only the tasks that something can be said about are listed.
LISTED_TASKS = 20


@dataclass(frozen=True)
class Row:
    """One task; `age` is that of its newest checkpoint in seconds."""

    task: str
    stage: str
    state: str
    reason: str = ""
    job: str = ""
    nodes: str = ""
    requeues: int = 0
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    checkpoint_step: int | None = None
    age: float | None = None
    log: str = ""


def known_status(config: Config, record: Record) -> list[Row]:
    """The status, from the store alone where Slurm does not answer."""
    try:
        return read_status(config, record)
    except SlurmError as error:
        logger.warning("Slurm not reachable from here (%s); this is what the store knows", error)
        return read_status(config, record, asks_slurm=False)


def read_status(config: Config, record: Record, asks_slurm: bool = True) -> list[Row]:
    """One row per task, in the order of the graph; without Slurm, as the jobs themselves said last."""
    tasks = build_tasks(config)
    run = Run(config)
    done = finished_tasks(run, tasks)
    spared = unneeded_tasks(tasks, done)
    # The queue before the events: a job that ends in between is then seen as ended, and not as lost.
    is_over = len(done | spared) == len(tasks)
    jobs = [] if is_over or not asks_slurm else _jobs(config, record)
    events = read_all_events(config)
    # What was committed since the first look says so itself.
    late = [task for task in tasks if task.name not in done and _says_finished(events.get(task.name, []))]
    done |= finished_tasks(Run(config), late)
    live = live_tasks(record, jobs, events)
    queued = {(job.job, job.index): job for job in jobs}
    told = {} if asks_slurm else _told(record, events)
    # Taken back ones too: what an earlier launch finished keeps its job and its log.
    carriers = {name: item for item in record.submissions if item.job for name in item.task_names}
    trained = [task for task in tasks if task.is_training]
    made = {task.name: run.done(task.stages[0], task.index) for task in trained if task.name in done}
    finished = {name: label for name, label in made.items() if label is not None}
    progress = progress_of_each(config, [task.name for task in trained], finished)
    return [
        _row(config, task, events.get(task.name, []), carriers.get(task.name), live, queued, done, spared, told, record,
             progress)
        for task in tasks
    ]  # fmt: skip


def _told(record: Record, events: dict[str, list[Event]]) -> dict[str, tuple[str, str]]:
    """How the jobs stand that have not said that they ended, by what they said last."""
    found = {name: ("submitted", f"to {record.cluster}") for item in record.live for name in item.task_names}
    for name, lines in events.items():
        last = lines[-1]["event"] if lines else ""
        if last in ("started", "requeued"):
            found[name] = ("started" if last == "started" else "submitted", f"at {_moment(lines[-1]['time'])}")
        elif last == "ended" and not _is_after(record, name, lines[-1]["time"]):
            found.pop(name, None)
    return found


def _is_after(record: Record, name: str, ended: float) -> bool:
    """Whether a task was submitted again after it had ended."""
    return any(item.submitted > ended for item in record.live if name in item.task_names)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def is_going_on(rows: list[Row]) -> bool:
    """Whether a task runs or may still run."""
    return any(row.state in GOING_ON for row in rows)


def is_success(rows: list[Row]) -> bool:
    """Whether all is committed, but for experts the model goes without."""
    return all(row.state in ("committed", "left out") for row in rows)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(row) for row in rows]


def describe(config: Config, rows: list[Row]) -> str:
    """The rows as a table; of a large array a line of counts and the tasks that are not just waiting or done."""
    lines = [f"{'job':<14} {'state':<11} {'step':>13} {'loss':>8} {'checkpoint':>16} {'requeued':>8}  job, node, log"]
    for group in build_groups(build_tasks(config)):
        found = [row for row in rows if row.stage == group.name]
        if len(found) > LISTED_TASKS:
            counts = Counter(row.state for row in found)
            lines.append(f"{group.name:<14} {', '.join(f'{count} {state}' for state, count in counts.items())}")
            found = [row for row in found if row.state not in ("pending", "committed")][:LISTED_TASKS]
        lines += [_line(row) for row in found]
    return "\n".join(lines)


def where_it_is(record: Record) -> str:
    """The cluster or machine that a run was started on, and its folder there."""
    folder = f", logs in {record.work_folder}" if record.work_folder else ""
    return f"started on {record.cluster}{folder}" if record.cluster else ""


def _says_finished(events: list[Event]) -> bool:
    return bool(events) and events[-1].get("reason") == "finished"


def _jobs(config: Config, record: Record) -> list[QueuedJob]:
    """What is in the queue, Slurm's or that of the launcher on this machine."""
    if record.is_local:
        return jobs_here(config, record)
    return queue([*job_names(record.run_id, [group.name for group in build_groups(build_tasks(config))]), *BY_HAND])


def _row(
    config: Config,
    task: Task,
    events: list[Event],
    carrier: Submission | None,
    live: dict[str, str],
    queued: dict[tuple[str, int | None], QueuedJob],
    done: set[str],
    spared: set[str],
    told: dict[str, tuple[str, str]],
    record: Record,
    progress: dict[str, Progress],
) -> Row:
    index = task.index - carrier.offset if carrier and task.index is not None else None
    job = queued.get((str(carrier.job), index)) if carrier else None
    by_hand = None if job else _job_by_hand(events, queued)
    requeues = count_requeues(events)
    if task.name in done:
        state, reason = "committed", ""
    elif task.name in spared:
        state, reason = "left out", "cluster.min_experts"
    elif task.name in live and job:
        state, reason = _queue_state(job, requeues)
    elif by_hand:
        state, reason = _queue_state(by_hand, requeues)
    elif task.name in told:
        state, reason = told[task.name]
    else:
        state, reason = _ended_state(events, carrier, job)
    found = progress.get(task.name, Progress()) if state != "pending" else Progress()
    shown, steps = job or by_hand, _steps(config, task)
    # What an object store tells of a finished training has its steps only where it ended before the last one.
    ended = steps if state == "committed" and found.loss is not None else None
    name = carrier.job_name(task.name) if carrier else str(events[-1].get("slurm_job") or "") if events else ""
    log = _log(config, task, carrier, events, record)
    return Row(
        task.name, task.group, state, reason, name, shown.nodes if shown else "", requeues,
        max(found.step, found.checkpoint_step) or ended, steps, found.loss, found.checkpoint_step or None,
        None if found.checkpoint_time is None else round(time.time() - found.checkpoint_time, 1), str(log),
    )  # fmt: skip


def _job_by_hand(events: list[Event], queued: dict[tuple[str, int | None], QueuedJob]) -> QueuedJob | None:
    """The job of a script in slurm/ that last said that it started, if Slurm still has it."""
    last = events[-1] if events else {"event": ""}
    if last["event"] not in ("started", "requeued") or any(event.get("key") for event in events):
        return None
    job, _, index = str(last.get("slurm_job") or "").partition("_")
    found = queued.get((job, int(index) if index.isdigit() else None))
    return found if found and found.is_live else None


def _log(config: Config, task: Task, carrier: Submission | None, events: list[Event], record: Record) -> str:
    """Where the job said that its log is, or will be: in the work folder that there was at the submission.

    A run may have been moved since, so that the usual place comes first where something lies there.
    """
    started = [event for event in events if event["event"] == "started" and event.get("log")]
    usual = _usual_log(config, task, carrier, record) if carrier else None
    if carrier and usual and (not started or started[-1].get("slurm_job") == carrier.job_name(task.name)):
        return str(usual) if usual.exists() or not started else str(started[-1]["log"])
    return str(started[-1]["log"]) if started else ""


def _usual_log(config: Config, task: Task, carrier: Submission, record: Record) -> Path:
    """The launcher's own choice; a run on an object store was perhaps submitted from another folder than this."""
    work = carrier.work or old_folder_name(run_path(config))
    path = log_file(config, task.group, task.index, carrier.offset, work)
    folder = Path(record.work_folder)
    return folder / "logs" / path.name if record.work_folder and folder.name == carrier.work else path


def _queue_state(job: QueuedJob, requeues: int) -> tuple[str, str]:
    if job.state == "RUNNING":
        return "running", ""
    if job.state in ("COMPLETING", "STAGE_OUT", "SIGNALING"):
        return "ending", ""
    reason = "" if job.reason == "None" else job.reason
    return ("requeued" if requeues else "pending"), reason


def _ended_state(events: list[Event], carrier: Submission | None, job: QueuedJob | None) -> tuple[str, str]:
    """A task that is neither committed nor in the queue."""
    if events and events[-1]["event"] == "ended":
        reason = str(events[-1].get("reason", ""))
        return ("cancelled", "") if reason == "cancelled" else ("failed", f"{reason}, code {events[-1].get('code')}")
    if events:
        return "failed", f"its job ended without a word{f' ({job.state})' if job else ''}"
    if carrier is None:
        return "missing", "not submitted"
    return "cancelled", job.reason if job and job.reason != "None" else "what it waited for failed, or it was stopped"


def _steps(config: Config, task: Task) -> int | None:
    phase = STAGES[task.stages[0]].phase
    return phase(config).steps if phase else None


def _line(row: Row) -> str:
    step = "" if row.step is None else f"{row.step}/{row.steps}"
    loss = "" if row.loss is None else f"{row.loss:.4f}"
    saved = "" if row.age is None else f"{row.checkpoint_step}, {row.age:.0f} s ago"
    where = " ".join(filter(None, (row.job, row.nodes, f"({row.reason})" if row.reason else "", row.log)))
    return f"{row.task:<14} {row.state:<11} {step:>13} {loss:>8} {saved:>16} {row.requeues or '':>8}  {where}"
