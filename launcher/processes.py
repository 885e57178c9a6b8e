"""The jobs of a run as processes of this machine: one after another, and the workers side by side.

The local launcher does here what Slurm does on a cluster: it starts the node program of each task when what it waits
for is done, passes signals on, and starts a job again that asks for it. Record, events, logs and the snapshot of the
code are the same, so that `status`, `logs`, `cancel`, `wait` and `resume` work for both.

A failed expert stops nobody else; what waits for it is not started. A stop signal is passed on to all jobs, which save
their state, and the same command continues later.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from checkpoints import paths
from launcher.allocation import LOCAL, Allocation
from launcher.command import without_torch_variables
from launcher.events import Event, append_event, merge_events, read_all_events, read_events
from launcher.layout import lock_url, log_file, work_folder
from launcher.lock import BusyError, command_of, is_alive, read_holder, submission_lock
from launcher.node import end_with_parent
from launcher.record import Record, Submission, load_record, new_key, new_record, save_record
from launcher.sbatch import job_names
from launcher.slurm import QueuedJob, SlurmError, queue
from launcher.snapshot import node_words, take_snapshot
from launcher.submit import live_tasks
from launcher.tasks import MERGED, Task, finished_tasks, is_finished, unneeded_tasks
from launcher.trust import require_readable_settings
from modularforge.config import Config
from modularforge.cost import flops_of_jobs, span
from modularforge.errors import Interrupted, UserError
from modularforge.run import Run

POLL_SECONDS = 0.1
LOG_TAIL_LINES = 15
# As long as `cancel` on a cluster waits: a job ends the step it is in and writes a checkpoint.
SAVING_SECONDS = 120.0
Say = Callable[[str], None]


class TaskError(UserError):
    """A task ended with an error; its log says why."""


@dataclass
class Running:
    """A job that runs: the process of its node program, the worker slot it holds, and how often it was started anew."""

    task: Task
    process: subprocess.Popen[bytes]
    slot: int
    restarts: int
    start: float = field(default_factory=time.monotonic)


class LocalLauncher:
    """Starts tasks when what they wait for is done, and watches them."""

    def __init__(self, config: Config, tasks: list[Task], say: Say) -> None:
        self.config, self.tasks, self.say = config, tasks, say
        self.running: list[Running] = []
        self.done: set[str] = set()
        self.failed: dict[str, int] = {}
        self.stop_signal: int | None = None
        self.carriers: dict[str, Submission] = {}
        self.log_starts: dict[str, int] = {}
        self.start = time.monotonic()
        self.tasks_by_name = {task.name: task for task in tasks}
        self.starts: dict[str, float] = {}

    def run(self) -> None:
        """Run all tasks; raises TaskError when one failed, Interrupted after a stop, BusyError beside another."""
        require_readable_settings(self.config)
        with submission_lock(self.config):
            self._run()

    def output_of(self, task_name: str) -> str:
        """What a job of this launch has written into its log."""
        content = self._log(next(task for task in self.tasks if task.name == task_name)).read_bytes()
        return content[self.log_starts.get(task_name, 0) :].decode(errors="replace")

    def _run(self) -> None:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._submit()
            while self._start_ready() or self.running:
                self._collect()
                time.sleep(POLL_SECONDS)
            merge_events(self.config, self.record.events())
        finally:
            if not self.stop_signal:
                self._pass_on(signal.SIGTERM)
            for item in self.running:
                item.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stop_signal:
            raise Interrupted("stopped; the jobs saved their state, and the same command continues")
        if set(self.failed) - unneeded_tasks(self.tasks, self.done):
            raise TaskError(self._failures())

    def _submit(self) -> None:
        """Write down what is missing, as for Slurm: one submission for a task or for all workers of a group.

        Experts that the committed model goes without (cluster.min_experts) count as done, as on a cluster.
        """
        self.record = record_for_processes(self.config)
        self._wait_for_orphans()
        finished = finished_tasks(Run(self.config), self.tasks)
        for name in sorted(unneeded_tasks(self.tasks, finished)):
            self.say(f"{name}: left out (cluster.min_experts)")
            self.done.add(name)
        self.snapshot = take_snapshot(self.config)
        groups: dict[str, list[Task]] = {}
        for task in self.tasks:
            if task.name not in self.done | finished or _is_always_run(task):
                groups.setdefault(task.group, []).append(task)
        self.record.cluster, self.record.work_folder = socket.gethostname(), str(work_folder(self.config))
        for item in self.record.submissions:
            item.withdrawn = True
        for group, tasks in groups.items():
            self._note(group, tasks)
        save_record(self.config, self.record)

    def _wait_for_orphans(self) -> None:
        """Jobs of a launcher that was killed get a moment to save their state: two writers of one job would fail."""
        end = time.monotonic() + SAVING_SECONDS
        if _orphans(self.config, self.record):
            self.say("waiting for the jobs of a launcher that was killed to save their state")
        while _orphans(self.config, self.record) and not self.stop_signal and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _note(self, group: str, tasks: list[Task]) -> None:
        number = len(self.record.submissions)
        indices = [task.index for task in tasks if task.index is not None]
        work = work_folder(self.config).name
        item = Submission(new_key(group, number), group, indices, job=f"{LOCAL}{number + 1}", work=work)
        self.record.submissions.append(item)
        self.carriers.update(dict.fromkeys((task.name for task in tasks), item))

    def _start_ready(self) -> bool:
        """Start every task that can start now; whether any was started."""
        started, run = False, Run(self.config)
        for task in self.tasks:
            if self.stop_signal or not self._is_ready(task) or (slot := self._free_slot(task)) is None:
                continue
            started = True
            if not _is_always_run(task) and is_finished(run, task):
                self.say(f"{task.name}: finished before")
                self.done.add(task.name)
            else:
                self._start(task, slot)
                self.say(f"{task.name}: started, log in {self._log(task)}")
        return started

    def _is_ready(self, task: Task) -> bool:
        known = self.done | set(self.failed) | {item.task.name for item in self.running}
        if task.group in MERGED and "assemble" in self.done:  # they would come too late
            return False
        if task.name in known or not self._has_waited(task) or self._lacks_experts(task):
            return False
        return all(name in self.done for name in task.needs)

    def _has_waited(self, task: Task) -> bool:
        """Whether all that it waits for has ended; a merge does not wait for stragglers beyond their time."""
        if all(name in self.done or self._never_comes(name) for name in task.after_end):
            return True
        most, now = self.config.cluster.straggler_minutes, time.monotonic()
        start = min(self.starts.get(name, now) for name in task.after_end)
        is_late = most is not None and now - start > 60 * most
        finished = sum(name in self.done for name in task.after_end)
        return is_late and task.is_merge and finished >= self.config.needed_experts

    def _never_comes(self, name: str) -> bool:
        """Whether a task failed, or what it waits for did."""
        if name in self.failed or name in self.done:
            return name in self.failed
        return any(map(self._never_comes, self.tasks_by_name[name].needs))

    def _lacks_experts(self, task: Task) -> bool:
        """Whether more experts failed than assembly, or a merge, can go without (cluster.min_experts)."""
        lost = sum(map(self._never_comes, task.after_end))
        return lost > self.config.experts.count - self.config.needed_experts

    def _free_slot(self, task: Task) -> int | None:
        """The lowest free worker slot, or None when all are taken; a task that is no worker runs alone."""
        taken = {item.slot for item in self.running}
        limit = self.config.launcher.max_workers if task.is_worker else 1
        return next((slot for slot in range(limit) if slot not in taken), None)

    def _start(self, task: Task, slot: int, restarts: int = 0) -> None:
        """Start the node program of a task, as the script of a Slurm job does."""
        if task.name not in self.carriers:  # finished when the run was launched, and of other inputs by now
            self._note(task.group, [task])
            save_record(self.config, self.record)
        log = self._log(task)
        allocation = self._allocation(task, restarts)
        command = node_words(sys.executable, self.snapshot, task.group, self.carriers[task.name].key)
        command += ["--allocation", allocation.as_word(), *(["--again"] if _is_always_run(task) else [])]
        with paths.open_to_append(log) as file:
            self.log_starts.setdefault(task.name, file.tell())
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=self._environment(task, slot), start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        self.running.append(Running(task, process, slot, restarts))
        self.starts.setdefault(task.name, time.monotonic())

    def _log(self, task: Task) -> Path:
        return log_file(self.config, task.group, task.index)

    def _allocation(self, task: Task, restarts: int) -> Allocation:
        job = str(self.carriers[task.name].job)
        processes = self.config.launcher.backbone_processes if task.name == "backbone" else 1
        gpus = min(1, len(_gpus())) if task.is_worker else len(_gpus())
        return Allocation(job, job, task.index, restarts, 1, socket.gethostname(), self._cores(task), gpus, processes)

    def _environment(self, task: Task, slot: int) -> dict[str, str]:
        """One GPU of its own for each worker, where there are several. How many threads, its node program says."""
        environment = without_torch_variables()
        environment.pop("OMP_NUM_THREADS", None)
        gpus = _gpus()
        if task.is_worker and gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return environment

    def _cores(self, task: Task) -> int:
        return max(1, _cores() // (self.config.launcher.max_workers if task.is_worker else 1))

    def _collect(self) -> None:
        """Note the tasks that ended, and start those again that ask for it."""
        for item in list(self.running):
            if (code := item.process.poll()) is not None:
                self.running.remove(item)
                self._judge(item, code if code >= 0 else 128 - code)

    def _judge(self, item: Running, code: int) -> None:
        name, seconds = item.task.name, time.monotonic() - item.start
        if code == 0:
            self.done.add(name)
            self.say(f"{name}: done in {seconds:.0f} s ({len(self.done)} of {len(self.tasks)} jobs{self._rest()})")
            return
        job = self.carriers[name].job_name(name)
        own = [event for event in read_events(self.config, name) if event.get("slurm_job") == job]
        if own and own[-1]["event"] == "requeued" and not self.stop_signal:
            self.say(f"{name}: starts again ({own[-1].get('reason')}) after {seconds:.0f} s")
            self._start(item.task, item.slot, item.restarts + 1)
            return
        if not own or own[-1]["event"] != "ended":  # killed, or ended by an error before it could say so
            reason = "cancelled" if self.stop_signal else "ended without a word"
            append_event(self.config, name, "ended", slurm_job=job, code=code, reason=reason)
        self.failed[name] = code
        self.say(f"{name}: ended with code {code} after {seconds:.0f} s")

    def _rest(self) -> str:
        """How long the others will take if they are as fast, by their FLOPs, as those that are done."""
        flops = flops_of_jobs(self.config)
        done = sum(flops.get(name, 0.0) for name in self.carriers if name in self.done)
        left = sum(flops.get(task.name, 0.0) for task in self.tasks if task.name not in self.done)
        seconds = (time.monotonic() - self.start) * left / done if done else 0.0
        return f", about {span(seconds)} left" if seconds else ""

    def _failures(self) -> str:
        """What failed, why (the end of its log), and what did not run because of it."""
        lines = []
        for task in self.tasks:
            if task.name in self.failed:
                code, log = self.failed[task.name], self._log(task)
                tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                lines += [f"{task.name} must end with code 0, but ended with {code}; the end of {log}:"]
                lines += [f"    {line}" for line in tail]
        waiting = [task.name for task in self.tasks if task.name not in self.done and task.name not in self.failed]
        if waiting:
            lines.append(f"not started for that reason: {', '.join(waiting)}; run the same command when it is fixed")
        return "\n".join(lines)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        again, self.stop_signal = self.stop_signal is not None, number
        if again:
            self.say("stopping at once: what is not saved yet is lost, what is committed stays")
            self._pass_on(signal.SIGKILL)
        else:
            self.say("stopping: waiting for the jobs to save their state; a second Ctrl-C ends them at once")
            self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        """A job's program passes a stop on to its training; to be killed, the whole group must be named."""
        for item in self.running:
            if item.process.poll() is None:
                (os.killpg if number == signal.SIGKILL else os.kill)(item.process.pid, number)


def record_for_processes(config: Config) -> Record:
    """The record to which a local launch adds, with these settings; raises BusyError while Slurm has jobs of the run.

    Unlike on a cluster, settings may change while nothing runs: stages tell by themselves what is of other settings.
    """
    record, new = load_record(config), new_record(config)
    if record is None:
        return new
    _require_no_slurm_jobs(config, record)
    return record if record.identity == new.identity else replace(new, submissions=record.submissions)


def _require_no_slurm_jobs(config: Config, record: Record) -> None:
    submitted = {item.group for item in record.live if not item.is_local}
    if not submitted:
        return
    try:
        jobs = queue(job_names(record.run_id, sorted(submitted)))
    except SlurmError:  # a machine without Slurm cannot tell; what the jobs write has locks of its own
        return
    if live := live_tasks(record, jobs, read_all_events(config)):
        raise BusyError(
            f"{config.output_dir} must have one launcher, but Slurm still has {', '.join(live):.200}; wait for them, "
            "or end them with `python -m launcher cancel`"
        )


def jobs_here(config: Config, record: Record) -> list[QueuedJob]:
    """What squeue tells of a run on Slurm, for one on this machine: its jobs that run, wait, or still save their state.

    While the launcher lives, what has not ended runs or waits. Without it, only what outlived it for a moment counts.
    """
    # The launcher before the events: when it ends in between, its jobs have noted that they ended.
    has_launcher = is_alive(read_holder(lock_url(config)))
    events = read_all_events(config)
    found = []
    for item in (item for item in record.live if item.is_local):
        for name in item.task_names:
            own = [event for event in events.get(name, []) if event.get("slurm_job") == item.job_name(name)]
            last: Event = own[-1] if own else {"event": "submitted"}
            if state := _state(last, item.key, has_launcher):
                index = item.place_of(name)
                found.append(QueuedJob(str(item.job), index, state, str(last.get("nodes", "")), "", "None", item.key))
    return found


def _state(last: Event, key: str, has_launcher: bool) -> str | None:
    """Slurm's word for a job with this last event; None for one that is over."""
    if last["event"] in ("submitted", "requeued"):
        return "PENDING" if has_launcher else None
    if last["event"] == "started" and has_launcher:
        return "RUNNING"
    return "COMPLETING" if last["event"] == "started" and _runs(last.get("pid"), key) else None


def stop_here(config: Config, record: Record, say: Say) -> Iterator[list[str]]:
    """Ask the launcher, or what it left, to stop; then yields the names of what still runs, until nothing does."""
    holder = read_holder(lock_url(config))
    pid = holder.get("pid")
    if is_alive(holder) and holder.get("host") != socket.gethostname():
        raise BusyError(
            f"the run must be cancelled where it runs, on {str(holder.get('host'))!r:.80}; type the same command there"
        )
    # The lock may lie where others write: only a process that is a launcher is signalled.
    if isinstance(pid, int) and is_alive(holder) and _runs(pid, "launcher"):
        say(f"asked the launcher (process {pid}) to stop; its jobs save their state")
        os.kill(pid, signal.SIGTERM)
    elif not is_alive(holder):
        for orphan in _orphans(config, record):
            os.kill(orphan, signal.SIGTERM)
    while left := _left(config, record):
        yield left
    yield []


def stop_one_here(config: Config, record: Record, name: str) -> bool:
    """Ask one job of this machine to stop; returns whether it ran."""
    holder = read_holder(lock_url(config))
    if is_alive(holder) and holder.get("host") != socket.gethostname():
        raise BusyError(
            f"the job must be cancelled where it runs, on {str(holder.get('host'))!r:.80}; type the same command there"
        )
    keys = [item.key for item in record.live if name in item.task_names]
    last = next(iter(read_events(config, name)[-1:]), None)
    if last is None or last["event"] != "started" or not any(_runs(last.get("pid"), key) for key in keys):
        return False
    os.kill(last["pid"], signal.SIGTERM)
    return True


def _left(config: Config, record: Record) -> list[str]:
    """The launcher or the jobs that still run."""
    jobs = [job for job in jobs_here(config, record) if job.state != "PENDING"]
    launcher = read_holder(lock_url(config))
    names = [job.job if job.index is None else f"{job.job}_{job.index}" for job in jobs]
    return names or ([f"the launcher (process {launcher.get('pid')})"] if is_alive(launcher) else [])


def _orphans(config: Config, record: Record) -> list[int]:
    """Processes of jobs that go on without a launcher, until they have saved their state."""
    events = read_all_events(config)
    last = [
        (item.key, events[name][-1])
        for item in record.live
        for name in item.task_names
        if item.is_local and events.get(name)
    ]
    return [event["pid"] for key, event in last if event["event"] == "started" and _runs(event.get("pid"), key)]


def _runs(pid: object, word: str) -> bool:
    """Whether a process of this machine has this id and this word in its command line: ids are given again."""
    return isinstance(pid, int) and pid > 0 and word in (command_of(pid) or "")


def _is_always_run(task: Task) -> bool:
    """The evaluation is cheap where nothing changed, and prints its table."""
    return task.stages == ("evaluate",)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """Names of the visible GPUs, without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return _listed_gpus()


@functools.cache
def _listed_gpus() -> list[str]:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
