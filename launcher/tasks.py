"""The pipeline as a graph of tasks: what each runs, what it waits for, and whether its artifact is there already.

A task is one job; tasks of one group (the experts) run side by side and become one array on a cluster.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from checkpoints import Artifact, MissingArtifactError, find_artifact
from modularforge.config import TRAINED_ON_ALL, Config, NodesConfig
from modularforge.pipeline import Finder, finished, plan_stage, stage_settings, stage_url

TRAINING = ("backbone", "expert", *TRAINED_ON_ALL, "branch")
NODES_OF: dict[str, str] = {
    "backbone": "backbone",
    **dict.fromkeys(TRAINED_ON_ALL, "backbone"),
    "expert": "expert",
    "branch": "expert",
}
"""Which section of `cluster` says what a group asks for; `other` for those that are not here."""


@dataclass(frozen=True)
class Task:
    """One job: its name and group, the arguments of `python -m modularforge`, what it waits for, and what it makes.

    `after` must have succeeded before it starts, `after_end` must only have ended.
    """

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...]
    stages: tuple[str, ...]
    index: int | None = None
    is_worker: bool = False
    after_end: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """Name of its group: its own, or that of its array."""
        return self.name if self.index is None else self.stages[0]

    @property
    def is_training(self) -> bool:
        """Whether it leaves checkpoints and metrics on its way."""
        return self.group in TRAINING


@dataclass(frozen=True)
class Group:
    """Tasks that are submitted together, and the groups they wait for."""

    name: str
    tasks: tuple[Task, ...]
    after: tuple[str, ...]
    after_end: tuple[str, ...]


def build_tasks(config: Config) -> list[Task]:
    """All tasks of a run, each after those it waits for; workers may run side by side."""
    experts = _workers(config, "expert")
    baselines = [
        Task(name, ("train", "--only", name), ("backbone",), (name,), is_worker=True)
        for name in TRAINED_ON_ALL
        if name in config.evaluation.baselines
    ]
    if "btx" in config.evaluation.baselines:
        baselines += _workers(config, "branch")
    names = tuple(task.name for task in experts)
    return [
        Task("prepare-data", ("prepare-data",), (), ("corpus", "partitions")),
        Task("backbone", ("train", "--only", "backbone"), ("prepare-data",), ("backbone",)),
        *experts,
        *baselines,
        Task("assemble", ("assemble",), (), ("assembled", "calibrated"), after_end=names),
        Task("evaluate", ("evaluate",), ("assemble", *(task.name for task in baselines)), ("evaluation",)),
    ]


def _workers(config: Config, stage: str) -> list[Task]:
    """One task for each partition, which become one array on a cluster."""
    return [
        Task(
            f"{stage}-{index}",
            ("train", "--only", stage, "--index", str(index)),
            ("backbone",),
            (stage,),
            index,
            is_worker=True,
        )
        for index in range(config.experts.count)
    ]


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
    nodes: NodesConfig = getattr(config.cluster, NODES_OF.get(group, "other"))
    return nodes


def remembering() -> Finder:
    """A finder that reads each manifest once: for one look at a run of thousands of experts."""
    return functools.cache(find_artifact)


def is_finished(config: Config, task: Task, find: Finder = find_artifact) -> bool:
    """Whether all that the task makes is committed; raises MismatchError when another config's lies there."""
    if task.stages == ("evaluation",):
        return _is_evaluated(config, find)
    try:
        return all(finished(plan_stage(config, stage, task.index, find=find), find) for stage in task.stages)
    except MissingArtifactError:
        return False


def finished_tasks(config: Config, tasks: list[Task], find: Finder) -> set[str]:
    """Names of the tasks whose work is done; `find` must remember, because the experts share their inputs."""
    return {task.name for task in tasks if is_finished(config, task, find)}


def unneeded_tasks(config: Config, tasks: list[Task], done: set[str]) -> set[str]:
    """Experts that the committed model goes without (cluster.min_experts): they are not tried again."""
    return {task.name for task in tasks if task.group == "expert" and task.name not in done and "assemble" in done}


def _is_evaluated(config: Config, find: Finder) -> bool:
    """Whether the evaluation is of these settings and of the models that are there now."""
    old = find(stage_url(config, "evaluation"))
    if old is None or old.manifest.settings != stage_settings(config, "evaluation"):
        return False
    models = [("assembled", _kept(config, "assembled", find)), ("calibrated", _kept(config, "calibrated", find))]
    models += [(name, _kept(config, name, find)) for name in TRAINED_ON_ALL if name in config.evaluation.baselines]
    if "btx" in config.evaluation.baselines:
        models += [(f"branch-{k}", _kept(config, "branch", find, k)) for k in range(config.experts.count)]
    if models[0][1] is None:
        return False
    inputs = old.manifest.inputs
    return all(inputs.get(label) == (model.manifest.fingerprint if model else None) for label, model in models)


def _kept(config: Config, stage: str, find: Finder, index: int | None = None) -> Artifact | None:
    try:
        artifact = finished(plan_stage(config, stage, index, find=find), find)
    except MissingArtifactError:
        return None
    return artifact if artifact and artifact.manifest.facts.get("kept", True) else None


def _groups(names: tuple[str, ...], group_of: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(group_of[name] for name in names))
