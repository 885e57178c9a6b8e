"""The pipeline as a graph of tasks: what each runs, what it waits for, and whether its artifacts are there already.

A task is one job of the table of stages (`modularforge/pipeline.py`); tasks of one group (the experts) run side by side
and become one array on a cluster.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from checkpoints import MissingArtifactError, paths
from modularforge.config import Config, NodesConfig
from modularforge.pipeline import ROUNDS, SHARED_WORK, STAGES, JobName, Stage, stage_settings, wanted_stages
from modularforge.run import Run, is_kept

MERGED = ("expert", *ROUNDS)
"""Jobs of which others go on without those that failed."""


@dataclass(frozen=True)
class Task:
    """One job: its name and group, the arguments of `python -m modularforge`, what it waits for, and what it makes.

    `after` must have succeeded before it starts, `after_end` must only have ended. `goes_on` is the task of its own
    index whose work it goes on with, which must have succeeded too.
    """

    job: JobName
    after: tuple[str, ...]
    stages: tuple[str, ...]
    after_end: tuple[str, ...] = ()
    goes_on: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Tasks that must have succeeded before it starts."""
        return (*self.after, self.goes_on) if self.goes_on else self.after

    @property
    def name(self) -> str:
        """`backbone`, `expert-3`."""
        return str(self.job)

    @property
    def index(self) -> int | None:
        """Which expert."""
        return self.job.index

    @property
    def group(self) -> str:
        """Name of its group: its own, or that of its array."""
        return self.job.stage

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `python -m modularforge` is called with: a job's name is its command."""
        return (self.group,) if self.index is None else (self.group, "--index", str(self.index))

    @property
    def is_training(self) -> bool:
        """Whether it leaves checkpoints and metrics on its way."""
        return STAGES[self.stages[0]].phase is not None

    @property
    def is_worker(self) -> bool:
        """Whether it runs beside others: one of many, a baseline, or a merge, which may not wait for the last."""
        return self.index is not None or (self.is_training and self.group != "backbone") or self.is_merge

    @property
    def is_merge(self) -> bool:
        """Whether it ends a round of experts."""
        return STAGES[self.stages[0]].round > 0 and self.index is None


@dataclass(frozen=True)
class Group:
    """Tasks that are submitted together, and the groups they wait for."""

    name: str
    tasks: tuple[Task, ...]
    after: tuple[str, ...]
    after_end: tuple[str, ...]

    @property
    def goes_on(self) -> str:
        """The group whose tasks of the same index these go on with."""
        return JobName.parse(self.tasks[0].goes_on).stage

    def patience(self, config: Config) -> int | None:
        """Minutes from the start of those that it waits for after which it waits no more; None for any time."""
        return config.cluster.straggler_minutes if self.tasks[0].is_merge else None


def build_tasks(config: Config) -> list[Task]:
    """All tasks of a run, each after those it waits for; workers may run side by side."""
    stages_of: dict[str, list[Stage]] = {}
    for stage in wanted_stages(config):
        stages_of.setdefault(stage.job_in(config), []).append(stage)
    job_of = {stage.name: job for job, stages in stages_of.items() for stage in stages}
    waits = {job: _waits_for(stages, job_of, config) - {job} for job, stages in stages_of.items()}
    tasks: dict[str, list[Task]] = {}
    for job, stages in stages_of.items():
        direct = waits[job] - {name for other in waits[job] for name in _all_before(other, waits)}
        # Experts only have to end: when one fails, the others go on without it (cluster.min_experts).
        read = {name for stage in stages for name in stage.inputs_of(config)}
        ended = {name for name in read if name in MERGED and not stages[0].is_indexed}
        before = next((name for name in read if name in ROUNDS and stages[0].is_indexed), "")
        names = tuple(stage.name for stage in stages)
        after, after_end = (
            tuple(task.name for name in stages_of if name in wanted for task in tasks[name])
            for wanted in (direct - ended, direct & ended)
        )
        tasks[job] = [
            Task(JobName(job, index), after, names, after_end, str(JobName(before, index)) if before else "")
            for index in stages[0].indices(config)
        ]
    return [task for found in tasks.values() for task in found]


def _waits_for(stages: Iterable[Stage], job_of: dict[str, str], config: Config) -> set[str]:
    """The jobs whose artifacts these stages read."""
    read = {name for stage in stages for name in stage.inputs_of(config)}
    if "models" in read:
        read |= {stage.name for stage in wanted_stages(config) if stage.is_measured}
    return {job_of[name] for name in read if name in job_of}


def _all_before(job: str, waits: dict[str, set[str]]) -> set[str]:
    """The jobs that have ended when this one starts."""
    return waits[job] | {name for other in waits[job] for name in _all_before(other, waits)}


def build_groups(tasks: list[Task]) -> list[Group]:
    """The tasks by group, in the order of the graph."""
    members: dict[str, list[Task]] = {}
    for task in tasks:
        members.setdefault(task.group, []).append(task)
    group_of = {task.name: task.group for task in tasks}
    return [
        Group(name, tuple(found), _groups(found[0].after, group_of), _groups(found[0].after_end, group_of))
        for name, found in members.items()
    ]


def nodes_of(config: Config, group: str) -> NodesConfig:
    """What the jobs of a group ask of a cluster."""
    nodes: NodesConfig = getattr(config.cluster, nodes_section(group))
    return nodes


def nodes_section(group: str) -> str:
    """The section of `cluster` that says it."""
    return next((stage.nodes for stage in STAGES.values() if stage.job == group), "other")


def is_finished(run: Run, task: Task) -> bool:
    """Whether all that the task makes is committed; raises MismatchError when another config's lies there."""
    if task.stages == ("evaluate",):
        return _is_evaluated(run)
    if (whole := SHARED_WORK.get(task.stages[-1])) and run.artifact(whole):
        return True
    return all(run.done(stage, task.index) for stage in task.stages)


def finished_tasks(run: Run, tasks: list[Task]) -> set[str]:
    """Names of the tasks whose work is done."""
    _look_side_by_side(run, tasks)
    return {task.name for task in tasks if is_finished(run, task)}


def _look_side_by_side(run: Run, tasks: list[Task]) -> None:
    """Let `run` know what ten thousand experts have committed, but of those that cannot have begun."""
    if paths.is_local(run.config.output_dir):
        return
    waiting = {task.group for task in tasks if task.index == 0 and not _may_begin(run, task)}
    found = [task for task in tasks if task.index is not None and task.group not in waiting]
    run.look_ahead(run.url(stage, task.index) for task in found for stage in task.stages)


def _may_begin(run: Run, task: Task) -> bool:
    """Whether what its first stage is made from is there."""
    try:
        run.plan(task.stages[0], task.index)
    except MissingArtifactError:
        return False
    return True


def unneeded_tasks(tasks: list[Task], done: set[str]) -> set[str]:
    """Experts that the committed model goes without (cluster.min_experts): they are not tried again."""
    return {task.name for task in tasks if task.group in MERGED and task.name not in done and "assemble" in done}


def kept_from_starting(tasks: list[Task], stopped: str, alive: Collection[str], needed_experts: int) -> list[str]:
    """Names of the tasks that cannot start once this one was stopped; `alive` are those that are done or may be."""
    lost = {stopped}
    for task in tasks:
        left = sum(name in alive and name not in lost for name in task.after_end)
        is_short = lost.intersection(task.after_end) and left < needed_experts
        if lost.intersection(task.needs) or is_short:
            lost.add(task.name)
    return [task.name for task in tasks if task.name in lost and task.name != stopped]


def _is_evaluated(run: Run) -> bool:
    """Whether the evaluation is of these settings and of the models that are there now."""
    old, assembled = run.find(run.url("evaluate")), run.artifact("assemble")
    if old is None or assembled is None or old.manifest.settings != stage_settings(run.config, "evaluate"):
        return False
    rows = [
        stage for stage in wanted_stages(run.config) if stage.is_measured and stage.name not in ("backbone", "expert")
    ]
    found = {JobName(stage.kind, k): run.artifact(stage.name, k) for stage in rows for k in stage.indices(run.config)}
    inputs = old.manifest.inputs
    return all(
        inputs.get(str(job)) == (model.manifest.fingerprint if model and is_kept(model) else None)
        for job, model in found.items()
    )


def _groups(names: tuple[str, ...], group_of: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group_of[name] for name in names))
