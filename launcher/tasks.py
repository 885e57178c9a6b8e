"""The pipeline as a graph of tasks: what each runs, what it waits for, and whether its artifact is there already."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints import MissingArtifactError
from modularforge.config import Config
from modularforge.pipeline import finished, plan_stage


@dataclass(frozen=True)
class Task:
    """One job: its name, the arguments of `python -m modularforge`, the tasks it waits for, and what it makes."""

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...]
    stages: tuple[str, ...]
    index: int | None = None
    is_worker: bool = False


def build_tasks(config: Config) -> list[Task]:
    """All tasks of a run, each after those it waits for; workers may run side by side."""
    experts = [
        Task(
            f"expert-{index}",
            ("train", "--only", "expert", "--index", str(index)),
            ("backbone",),
            ("expert",),
            index,
            is_worker=True,
        )
        for index in range(config.experts.count)
    ]
    baselines = []
    if "dense" in config.evaluation.baselines:
        baselines.append(Task("dense", ("train", "--only", "dense"), ("backbone",), ("dense",), is_worker=True))
    names = tuple(task.name for task in experts)
    return [
        Task("prepare-data", ("prepare-data",), (), ("corpus", "partitions")),
        Task("backbone", ("train", "--only", "backbone"), ("prepare-data",), ("backbone",)),
        *experts,
        *baselines,
        Task("assemble", ("assemble",), names, ("assembled", "calibrated")),
        Task("evaluate", ("evaluate",), ("assemble", *(task.name for task in baselines)), ()),
    ]


def is_finished(config: Config, task: Task) -> bool:
    """Whether all that the task makes is committed; raises MismatchError when another config's lies there.

    The evaluation is never finished in this sense: it is cheap, and reports what is there.
    """
    if not task.stages:
        return False
    try:
        return all(finished(plan_stage(config, stage, task.index)) for stage in task.stages)
    except MissingArtifactError:
        return False
