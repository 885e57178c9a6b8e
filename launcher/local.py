"""Run tasks as processes of this machine: one after another, and the workers side by side.

A failed expert stops nobody else; what waits for it is not started. A stop signal is passed on to all processes, which
save their state, and the same command continues later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from checkpoints import paths
from launcher.environment import without_torch_variables
from launcher.events import append_event, merge_events
from launcher.lock import submission_lock
from launcher.places import folder_name
from launcher.tasks import Task, finished_tasks, is_finished, unneeded_tasks
from launcher.unsaved import require_readable_settings
from modularforge.config import Config
from modularforge.errors import Interrupted, UserError
from modularforge.run import Run
from modularforge.settings import to_yaml

POLL_SECONDS = 0.1
LOG_TAIL_LINES = 15
PR_SET_PDEATHSIG = 1
Say = Callable[[str], None]


class TaskError(UserError):
    """A task ended with an error; its log says why."""


@dataclass
class Running:
    """A process, its log and the worker slot it holds."""

    task: Task
    process: subprocess.Popen[bytes]
    log: Path
    slot: int
    start: float = field(default_factory=time.monotonic)


class LocalLauncher:
    """Starts tasks when what they wait for is done, and watches them."""

    def __init__(self, config: Config, tasks: list[Task], say: Say) -> None:
        self.config, self.tasks, self.say = config, tasks, say
        self.folder = _work_folder(config)
        self.settings = self.folder / "config.yaml"
        self.running: list[Running] = []
        self.done: set[str] = set()
        self.failed: dict[str, tuple[int, Path]] = {}
        self.stop_signal: int | None = None

    def run(self) -> None:
        """Run all tasks; raises TaskError when one failed, Interrupted after a stop, BusyError beside a rival."""
        require_readable_settings(self.config)
        with submission_lock(self.config):
            self._run()

    def _run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(to_yaml(self.config), encoding="utf-8")
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self._leave_out()
        try:
            while self._start_ready() or self.running:
                self._collect()
                time.sleep(POLL_SECONDS)
            merge_events(self.config, ())
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

    def _leave_out(self) -> None:
        """Count as done the experts that the committed model goes without (cluster.min_experts), as on a cluster."""
        finished = finished_tasks(Run(self.config), self.tasks)
        for name in sorted(unneeded_tasks(self.tasks, finished)):
            self.say(f"{name}: left out (cluster.min_experts)")
            self.done.add(name)

    def _start_ready(self) -> bool:
        """Start every task that can start now; whether any was started."""
        started = False
        for task in self.tasks:
            if self.stop_signal or not self._is_ready(task):
                continue
            if task.stages != ("evaluation",) and is_finished(
                Run(self.config), task
            ):  # it is cheap, and prints its table
                self.say(f"{task.name}: finished before")
                self.done.add(task.name)
                started = True
            elif (slot := self._free_slot(task)) is not None:
                self._start(task, slot)
                started = True
        return started

    def _is_ready(self, task: Task) -> bool:
        ended = self.done | set(self.failed)
        known = ended | {item.task.name for item in self.running}
        if task.name in known or not all(name in ended for name in task.after_end) or self._lacks_experts(task):
            return False
        return all(name in self.done for name in task.after)

    def _lacks_experts(self, task: Task) -> bool:
        """Whether more experts failed than the assembly can go without (cluster.min_experts)."""
        failed = sum(name in self.failed for name in task.after_end)
        return "assembled" in task.stages and failed > self.config.experts.count - self.config.needed_experts

    def _free_slot(self, task: Task) -> int | None:
        """The lowest free worker slot, or None when all are taken; a task that is no worker runs alone."""
        taken = {item.slot for item in self.running}
        limit = self.config.launcher.max_workers if task.is_worker else 1
        return next((slot for slot in range(limit) if slot not in taken), None)

    def _start(self, task: Task, slot: int) -> None:
        log = self.folder / f"{task.name}.log"
        command = [*self._python(task), "-m", "modularforge", *task.arguments, "--config", str(self.settings)]
        with paths.open_to_append(log) as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment(task, slot),
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self.running.append(Running(task, process, log, slot))
        append_event(self.config, task.name, "started")
        self.say(f"{task.name}: started, log in {log}")

    def _python(self, task: Task) -> list[str]:
        processes = self.config.launcher.backbone_processes
        if task.name != "backbone" or processes == 1:
            return [sys.executable]
        return [sys.executable, "-m", "modularforge.training.elastic", "--standalone", f"--nproc-per-node={processes}"]

    def _environment(self, task: Task, slot: int) -> dict[str, str]:
        """Each worker gets its share of the cores, and one GPU of its own where there are several."""
        workers = self.config.launcher.max_workers if task.is_worker else 1
        if task.name == "backbone":
            workers = self.config.launcher.backbone_processes
        environment = {**without_torch_variables(), "OMP_NUM_THREADS": str(max(1, _cores() // workers))}
        gpus = _gpus()
        if task.is_worker and gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return environment

    def _collect(self) -> None:
        """Note the tasks that ended."""
        for item in list(self.running):
            code = item.process.poll()
            if code is None:
                continue
            self.running.remove(item)
            seconds = time.monotonic() - item.start
            append_event(self.config, item.task.name, "ended", code=code)
            if code == 0:
                self.done.add(item.task.name)
                self.say(f"{item.task.name}: done in {seconds:.0f} s")
            else:
                self.failed[item.task.name] = (code, item.log)
                self.say(f"{item.task.name}: ended with code {code} after {seconds:.0f} s")

    def _failures(self) -> str:
        """What failed, why (the end of its log), and what did not run because of it."""
        lines = []
        for name, (code, log) in self.failed.items():
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            lines += [f"{name} must end with code 0, but ended with {code}; the end of {log}:"]
            lines += [f"    {line}" for line in tail]
        waiting = [task.name for task in self.tasks if task.name not in self.done and task.name not in self.failed]
        if waiting:
            lines.append(f"not started for that reason: {', '.join(waiting)}; run the same command when it is mended")
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
        for item in self.running:
            if item.process.poll() is None:
                os.killpg(item.process.pid, number)


def _work_folder(config: Config) -> Path:
    """Where logs and the frozen settings of the jobs lie: in the run, or beside it on this machine for a remote run."""
    if paths.is_local(config.output_dir):
        return paths.local_path(config.output_dir) / "logs"
    return Path(tempfile.gettempdir()) / f"modularforge-logs-{os.getuid()}" / folder_name(config.output_dir)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """Names of the visible GPUs, without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def _die_with_parent() -> None:
    """Ask Linux to end this process when the launcher is killed, so that no job is left without one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
