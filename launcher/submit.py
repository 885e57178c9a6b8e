"""Submit what is missing of a run, as a transaction: run again after a kill at any point, nothing is lost or doubled.

Manifests tell what is finished and squeue what is still going on; the rest is submitted, group by group. Each
submission is noted before sbatch is called, found again by its comment when no answer came, and a job that starts
although the record names another one in its place ends at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.arrays import ArrayPart, cut
from launcher.events import Event, read_all_events
from launcher.layout import work_folder
from launcher.record import Record, Submission, new_key, save_record
from launcher.sbatch import Request, comment_of, job_names, submit
from launcher.slurm import NEVER, QueuedJob, SlurmError, queue, run_slurm, site_settings
from launcher.snapshot import take_snapshot
from launcher.tasks import Group, Task, build_groups, build_tasks, finished_tasks, unneeded_tasks
from modularforge.config import Config
from modularforge.pipeline import JobName
from modularforge.run import Run

Say = Callable[[str], None]
# After an sbatch that failed its job may still appear in the queue.
LOOKS, SECONDS_BETWEEN_LOOKS = 5, 2.0


@dataclass(frozen=True)
class Waiting:
    """One job or array before it has a key: its group, its part of an array, and what it waits for (`Request`)."""

    group: str
    part: ArrayPart | None
    after_success: tuple[str, ...] = ()
    after_end: tuple[str, ...] = ()
    after_task: tuple[str, ...] = ()
    patience: int | None = None

    def request(self, key: str, run_id: str, snapshot: Path) -> Request:
        """The same with what the submission adds."""
        waits = self.after_success, self.after_end, self.after_task, self.patience
        return Request(self.group, key, run_id, snapshot, self.part, *waits)


@dataclass
class Submitter:
    """What is known of a run while its missing tasks are submitted."""

    config: Config
    record: Record
    say: Say
    snapshot: Path = field(default_factory=Path)
    max_array_size: int = 1001
    done: set[str] = field(default_factory=set)
    live: dict[str, str] = field(default_factory=dict)
    submitted: int = 0

    def is_needed(self) -> bool:
        """Whether anything of the run is not finished."""
        tasks = build_tasks(self.config)
        self.done = finished_tasks(Run(self.config), tasks)
        self.done |= unneeded_tasks(tasks, self.done)
        return len(self.done) < len(tasks)

    def run(self) -> int:
        """Submit all that is missing; returns the number of submissions."""
        if not self.is_needed():
            return 0
        tasks = build_tasks(self.config)
        self.live = self._live_tasks()
        site = site_settings()
        self.max_array_size = int(site.get("MaxArraySize", self.max_array_size))
        self.record.cluster, self.record.work_folder = site.get("ClusterName", ""), str(work_folder(self.config))
        self.snapshot = take_snapshot(self.config)
        for group in build_groups(tasks):
            self._submit_group(group)
        return self.submitted

    def _live_tasks(self) -> dict[str, str]:
        """The Slurm job that carries each task now; submissions without an answer are looked for first."""
        jobs = queue(job_names(self.record.run_id, [group.name for group in build_groups(build_tasks(self.config))]))
        events = read_all_events(self.config)
        for item in self.record.submissions:
            if item.job is None and not item.withdrawn:
                item.job = find_job(self.record.run_id, item.key, jobs, events)
                item.withdrawn = item.job is None
        save_record(self.config, self.record)
        if dead := sorted({job.job for job in jobs if job.reason == NEVER}):
            run_slurm("scancel", *dead)
        return live_tasks(self.record, jobs, events)

    def _submit_group(self, group: Group) -> None:
        """Submit the tasks that nobody carries; a waiting job whose parents are new is taken back and put anew."""
        names = [task.name for task in group.tasks if task.name not in self.done]
        after_success, after_end = self._jobs_of(group.after), self._jobs_of(group.after_end)
        self._take_back_outdated(group, {*after_success, *after_end})
        missing = [task for task in group.tasks if task.name in names and task.name not in self.live]
        if not missing:
            return
        if missing[0].index is None:
            self._submit(Waiting(group.name, None, after_success, after_end, patience=group.patience(self.config)))
            return
        # One array for those that go on with tasks of one job each: in the array that it waits for, a task has a twin.
        for twin, tasks in by_twin(missing, self.live, self.done).items():
            indices = [task.index for task in tasks if task.index is not None]
            jobs: list[str] = []
            for part in cut(indices, self.max_array_size, self.config.cluster.array_throttle):
                before = () if part.after is None else (jobs[part.after],)
                waiting = Waiting(group.name, part, after_success, (*after_end, *before), tuple(filter(None, [twin])))
                jobs.append(self._submit(waiting))

    def _jobs_of(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """Jobs that still carry tasks of these groups."""
        carried = (job for name, job in self.live.items() if _group_of(name) in groups and name not in self.done)
        return tuple(dict.fromkeys(carried))

    def _take_back_outdated(self, group: Group, parents: set[str]) -> None:
        """Cancel this group's jobs that wait for others than the parents of now."""
        for item in self.record.live:
            carried = [name for name in item.task_names if self.live.get(name) == item.job]
            twins = by_twin([task for task in group.tasks if task.name in carried], self.live, self.done)
            if item.group == group.name and carried and (parents | {*filter(None, twins)}) - set(item.after):
                self.say(f"{group.name}: job {item.job} is taken back, because what it waits for is submitted anew")
                item.withdrawn = True
                save_record(self.config, self.record)
                run_slurm("scancel", str(item.job))
                for name in carried:
                    del self.live[name]

    def _submit(self, waiting: Waiting) -> str:
        """One call of sbatch; returns the job id."""
        group, part = waiting.group, waiting.part
        key = new_key(group, len(self.record.submissions))
        indices, offset = (list(part.indices), part.offset) if part else ([], 0)
        after = [*waiting.after_success, *waiting.after_end, *waiting.after_task]
        work = work_folder(self.config).name
        item = Submission(key, group, indices, offset, after=after, work=work)
        self.record.submissions.append(item)
        save_record(self.config, self.record)
        request = waiting.request(key, self.record.run_id, self.snapshot)
        item.job = self._sbatch(request)
        save_record(self.config, self.record)
        self.live.update(dict.fromkeys(item.task_names, item.job))
        self.submitted += 1
        self.say(f"{group}: submitted as job {item.job}{f' (array {part.array})' if part else ''}")
        return item.job

    def _sbatch(self, request: Request) -> str:
        """Submit; when sbatch fails, the job may exist all the same, so it is looked for before the error counts."""
        try:
            return submit(self.config, request)
        except SlurmError as error:
            if not _may_have_succeeded(error):
                raise
            for _ in range(LOOKS):
                jobs = queue(job_names(request.run_id, [request.group]))
                if found := find_job(request.run_id, request.key, jobs, {}):
                    return found
                time.sleep(SECONDS_BETWEEN_LOOKS)
            raise


def by_twin(tasks: Iterable[Task], live: Mapping[str, str], done: Container[str]) -> dict[str, list[Task]]:
    """Tasks by the job that carries what each goes on with; empty where that is finished, or there is none."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        twin = "" if task.goes_on in done else live.get(task.goes_on, "")
        found.setdefault(twin, []).append(task)
    return found


def live_tasks(record: Record, jobs: list[QueuedJob], events: dict[str, list[Event]]) -> dict[str, str]:
    """The Slurm job that carries each task: in the queue, and not past its last event.

    One that waits has a start before it, whatever it noted: somebody may have sent an ended job back to the queue.
    """
    states = {(job.job, job.index): job.state for job in jobs if job.is_live}
    found = {}
    for item in record.live:
        for name in item.task_names:
            index = item.place_of(name)
            state = states.get((str(item.job), index))
            if state == "PENDING" or (state and not _has_ended(events.get(name, []), str(item.job), index)):
                found[name] = str(item.job)
    return found


def find_job(run_id: str, key: str, jobs: list[QueuedJob], events: dict[str, list[Event]]) -> str | None:
    """The job that was submitted under a key: in the queue by its comment, or by what it noted when it started."""
    for job in jobs:
        if job.comment == comment_of(run_id, key):
            return job.job
    for event in (event for lines in events.values() for event in lines):
        if event.get("key") == key and event.get("slurm_job"):
            return str(event["slurm_job"]).partition("_")[0]
    return None


def _has_ended(events: list[Event], job: str, index: int | None) -> bool:
    """Whether the job noted its end: Slurm may list it as COMPLETING for a while."""
    name = job if index is None else f"{job}_{index}"
    own = [event for event in events if event.get("slurm_job") == name]
    return bool(own) and own[-1]["event"] == "ended"


def _may_have_succeeded(error: SlurmError) -> bool:
    text = str(error).lower()
    return any(
        word in text for word in ("timed out", "timeout", "answer within", "communication", "connection", "contact")
    )


def _group_of(task_name: str) -> str:
    return JobName.parse(task_name).stage
