"""Run one task of the pipeline as a job, watch it, and decide what follows when it has ended: on Slurm and here.

`python -m launcher.node GROUP` is the batch step of a Slurm job; the training runs below it as a step of its own. So
Slurm's warning signal reaches the training and not this program, which outlives a crash of the training, notes what
happened, and is the only one to requeue the job. The scripts in slurm/ use it too.

The local launcher starts it with `--allocation`, and does what Slurm does: it signals the job and starts it again.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from types import FrameType

from checkpoints import paths
from checkpoints.screen import shown_command
from launcher.allocation import Allocation
from launcher.command import child_environment, processes_of, training_command
from launcher.events import Event, append_event, newest_checkpoint, progress_of, read_events
from launcher.own_log import own_log, tail_beside_run
from launcher.record import load_record
from launcher.report import finish_run
from launcher.retry_policy import ASKED_TO_STOP, Decision, Ended, count_requeues, decide
from launcher.slurm import SlurmError, job_fields, minutes, run_slurm
from launcher.tasks import Task, build_tasks, is_finished
from modularforge.config import Config
from modularforge.errors import ConfigError
from modularforge.exits import run_app
from modularforge.options import settings_from
from modularforge.run import Run

PR_SET_PDEATHSIG = 1
# S3 answers 5,500 reads a second below one prefix, and a job begins with about forty (docs/thousands.md).
STARTS_A_SECOND = 140
SHORTEST_SPREAD = 5.0  # seconds; fewer jobs than that would take do not start within one second anyway


def main() -> None:
    """Entry point; the exit code is that of the task."""
    options = _parser().parse_args()
    config = settings_from(
        options.config, options.set, smoke_test=options.smoke_test, data_dir=options.data_dir,
        output_dir=options.output_dir,
    )  # fmt: skip
    given = options.allocation
    allocation = Allocation.from_word(given) if given else Allocation.of_this_job(options.processes)
    task = find_task(config, options.group, allocation.array_index, options.offset)
    if not given:
        spread_start(config, task)
    sys.exit(run_task(config, task, allocation, _settings_options(options), options.key, options.again))


def spread_start(config: Config, task: Task) -> None:
    """Wait for a moment of chance where thousands start at once, as all of them read the same few objects first."""
    longest = config.experts.count / STARTS_A_SECOND if task.index is not None else 0.0
    if longest >= SHORTEST_SPREAD and not paths.is_local(config.output_dir):
        time.sleep(random.uniform(0.0, longest))


def find_task(config: Config, group: str, array_index: int | None, offset: int) -> Task:
    """The task that this job or array task stands for; raises ConfigError with the ones there are."""
    index = None if array_index is None else array_index + offset
    for task in build_tasks(config):
        if task.group == group and task.index == index:
            return task
    groups = ", ".join(dict.fromkeys(task.group for task in build_tasks(config)))
    raise ConfigError(
        f"the job must be one of {groups}, with an array index below experts.count ({config.experts.count}) for expert "
        f"alone, but is {group!r} with index {index}; fix the script or its --array"
    )


def run_task(
    config: Config, task: Task, allocation: Allocation, options: list[str], key: str, again: bool = False
) -> int:
    """Run it unless it is done (and not wanted `again`) or another job has it; returns the exit code for Slurm."""
    if not again and is_finished(Run(config), task):
        print(f"{task.name} is finished", flush=True)
        return 0
    if _is_replaced(config, key, allocation):
        print(f"{task.name} was taken back or belongs to another Slurm job by now; this one ends", flush=True)
        return 0
    history = [event for event in read_events(config, task.name) if event.get("slurm_job") == allocation.name]
    history += _note_start(config, task, allocation, history, key)
    command = training_command(config, task, allocation, options)
    print(f"{task.name}: {shown_command(*command)}", flush=True)
    environment = child_environment(config, processes_of(config, task, allocation), allocation)
    with tail_beside_run(config, task.name):
        code, was_stopped = run_child(command, environment, allocation.is_local)
    if code == 0 and is_finished(Run(config), task):
        append_event(config, task.name, "ended", slurm_job=allocation.name, code=0, reason="finished")
        if task.group == "evaluate":
            finish_run(config)
        return 0
    step = newest_checkpoint(config, task.name)[0]
    first_step = int(history[-1].get("step", 0))
    if allocation.is_local:
        state = ASKED_TO_STOP if was_stopped else "RUNNING"
        ended = Ended(code or 1, state, first_step=first_step, step=step)
    else:
        ended = _how_it_ended(allocation, code or 1, first_step, step)
    return _follow_up(config, task, allocation, history, ended)


def run_child(command: list[str], environment: dict[str, str], is_local: bool = False) -> tuple[int, bool]:
    """Run the training and wait for it, whatever signals come; its exit code, and whether this program was stopped.

    At scancel Slurm signals every process of the job by itself. Only USR2 is passed on: it reaches this program alone
    where a script asks for `--signal=B:USR2`. A local launcher signals this program alone, so here all is passed on.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: set[int] = set()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.add(number)
        for child in children:
            if (is_local or number == signal.SIGUSR2) and child.poll() is None:
                child.send_signal(number)

    # Before the child starts: a signal in between would end this program and leave the child alone.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, pass_on)
    children.append(subprocess.Popen(command, env=environment, preexec_fn=end_with_parent if is_local else None))
    if is_local and received:  # they came while the child was being started
        children[0].send_signal(signal.SIGTERM)
    code = children[0].wait()
    return (code if code >= 0 else 128 - code), bool(received)


def end_with_parent() -> None:
    """In a new process: ask Linux to end it when the one that started it is killed, so that no job is left alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _note_start(config: Config, task: Task, allocation: Allocation, history: list[Event], key: str) -> list[Event]:
    """Note that the job starts, and before that a requeue that was not ours: a failed node, or no time to say it."""
    noted = []
    if allocation.restarts > count_requeues(history):
        noted.append(
            append_event(config, task.name, "requeued", slurm_job=allocation.name, reason="by Slurm",
                         step=newest_checkpoint(config, task.name)[0])
        )  # fmt: skip
    found = progress_of(config, task.name)
    noted.append(
        append_event(
            config, task.name, "started", slurm_job=allocation.name, key=key, restarts=allocation.restarts,
            nodes=allocation.node_list, node_count=allocation.nodes, gpus=allocation.gpus, pid=os.getpid(),
            log=own_log(),
            step=found.checkpoint_step, last_step=max(found.step, found.checkpoint_step), last_time=found.time,
        )
    )  # fmt: skip
    return noted


def _follow_up(config: Config, task: Task, allocation: Allocation, history: list[Event], ended: Ended) -> int:
    """Requeue the job or note its end; returns the exit code."""
    if ended.is_sent_back:
        print(f"{task.name} ended with code {ended.code}: Slurm has sent it back to the queue", flush=True)
        append_event(config, task.name, "requeued", slurm_job=allocation.name, reason="sent back", step=ended.step)
        return ended.code
    decision = decide(ended, history, config.cluster)
    print(f"{task.name} ended with code {ended.code}: {decision.text}", flush=True)
    if decision.again and _requeue(config, task, allocation, decision, ended.step):
        return ended.code
    append_event(config, task.name, "ended", slurm_job=allocation.name, code=ended.code, reason=decision.reason)
    return ended.code


def _how_it_ended(allocation: Allocation, code: int, first_step: int, step: int) -> Ended:
    try:
        known = job_fields(allocation.name)
    except SlurmError as error:
        print(f"Slurm does not tell how this job stands: {error}", flush=True)
        return Ended(code, state="UNKNOWN", first_step=first_step, step=step)
    # An earlier start's preemption stays in what Slurm says.
    preempted = known.get("PreemptTime", "None")
    was_preempted = preempted != "None" and preempted >= known.get("StartTime", "")
    return Ended(
        code, known.get("JobState", "UNKNOWN"), was_preempted, minutes(known.get("RunTime", "0")),
        minutes(known.get("TimeLimit", "UNLIMITED")), first_step, step,
        is_sent_back=int(known.get("Restarts", 0)) > allocation.restarts,
    )  # fmt: skip


def _requeue(config: Config, task: Task, allocation: Allocation, decision: Decision, step: int) -> bool:
    """Send this job, or only this task of its array, back to the queue; noted first, for Slurm then ends this program.

    `scontrol requeue $SLURM_JOB_ID` in the last task of an array would start the whole array again.
    """
    append_event(config, task.name, "requeued", slurm_job=allocation.name, reason=decision.reason, step=step)
    if allocation.is_local:  # the local launcher reads it there
        return True
    try:
        run_slurm("scontrol", "requeue", allocation.name)
    except SlurmError as error:
        print(f"the job cannot go back to the queue: {error}", flush=True)
        return False
    return True


def _is_replaced(config: Config, key: str, allocation: Allocation) -> bool:
    """Whether the run record gives this submission up, or names another job for it."""
    record = load_record(config) if key else None
    own = [item for item in record.submissions if item.key == key] if record else []
    return any(item.withdrawn or item.job not in (None, allocation.array_job) for item in own)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description=__doc__)
    parser.add_argument(
        "group",
        help="a name of the task list, such as backbone, expert, dense or evaluate",
    )
    parser.add_argument("--config", help="settings file; default: the run's own, or configs/default.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument("--smoke-test", action="store_true", help="tiny sizes")
    parser.add_argument("--data-dir", help="prepared data")
    parser.add_argument("--output-dir", help="root of the run")
    parser.add_argument("--offset", type=int, default=0, help="expert that array task 0 stands for")
    parser.add_argument("--processes", type=int, help="training processes per node; default: as the settings say")
    parser.add_argument("--key", default="", help="name of the submission, from the launcher")
    parser.add_argument("--allocation", default="", help="what the local launcher gives the job in Slurm's place")
    parser.add_argument("--again", action="store_true", help="run it even if it is finished")
    return parser


def _settings_options(options: argparse.Namespace) -> list[str]:
    """The options that give the training the same settings."""
    words = ["--config", options.config] if options.config else []
    for change in options.set:
        words += ["--set", change]
    words += ["--smoke-test"] if options.smoke_test else []
    words += ["--data-dir", options.data_dir] if options.data_dir else []
    return words + (["--output-dir", options.output_dir] if options.output_dir else [])


if __name__ == "__main__":
    run_app(main)
