"""`plan`: every script, the graph and the hours asked, as text; touches neither Slurm nor storage."""

from __future__ import annotations

from pathlib import Path

from launcher.arrays import cut
from launcher.record import run_id_of
from launcher.sbatch import Request, script_of
from launcher.snapshot import snapshot_folder
from launcher.tasks import Group, build_groups, build_tasks, nodes_of
from launcher.trust import require_open_places
from modularforge.config import Config
from modularforge.cost import GPU_SHARE_REACHED, USUAL_GPU, gpu_hours

# Slurm's default; the submission asks the site.
MAX_ARRAY_SIZE = 1001


def describe_plan(config: Config) -> str:
    """What a launch of this run from nothing would submit."""
    require_open_places(config)
    groups, run_id, snapshot = build_groups(build_tasks(config)), run_id_of(config), snapshot_folder(config)
    requests = [request for group in groups for request in _requests(config, group, run_id, snapshot)]
    scripts = [f"===== {request.key}\n{script_of(config, request)}" for request in requests]
    graph = "\n".join(_line(config, group) for group in groups)
    return "\n".join([*scripts, f"===== run {run_id} at {config.output_dir}", graph, hours(config, groups)])


def hours(config: Config, groups: list[Group]) -> str:
    """GPU-hours and core-hours if every job used all of its time, and what of it the computation itself needs."""
    most = {"gpus": 0.0, "cpus": 0.0}
    for group in groups:
        nodes = nodes_of(config, group.name)
        node_hours = nodes.nodes * len(group.tasks) * nodes.time_minutes / 60
        most = {name: value + node_hours * getattr(nodes, name) for name, value in most.items()}
    asked = f"asks for at most {most['gpus']:,.1f} GPU-hours and {most['cpus']:,.1f} core-hours"
    on_gpus = [group.name for group in groups if nodes_of(config, group.name).gpus]
    needed = gpu_hours(config, on_gpus)
    if not needed:
        return asked
    return (
        f"{asked}; of the former the FLOPs need about {needed:,.2g}, at {GPU_SHARE_REACHED:.0%} of the peak of "
        f"{USUAL_GPU}s{_price(config, needed, most['gpus'])}"
    )


def _price(config: Config, needed: float, most: float) -> str:
    each = config.cluster.price_per_gpu_hour
    return "" if each is None else f"; at {each:g} per GPU-hour about {needed * each:,.2f}, at most {most * each:,.2f}"


def _requests(config: Config, group: Group, run_id: str, snapshot: Path) -> list[Request]:
    """Requests with names in place of the job ids that only sbatch gives."""
    success = tuple(f"<{name}>" for name in group.after)
    ended = tuple(f"<{name}>" for name in group.after_end)
    twins = tuple(f"<{name}>" for name in [group.goes_on] if name)
    if group.tasks[0].index is None:
        waits = success, ended, twins, group.patience(config)
        return [Request(group.name, group.name, run_id, snapshot, None, *waits)]
    parts = cut(list(range(len(group.tasks))), MAX_ARRAY_SIZE, config.cluster.array_throttle)
    return [
        Request(group.name, f"{group.name}-{number}", run_id, snapshot, part, success, ended, twins)
        for number, part in enumerate(parts)
    ]


def _end(config: Config, group: Group, name: str) -> str:
    minutes = group.patience(config)
    return f"{name} has ended" + ("" if minutes is None else f" or {minutes} min have passed since it started")


def _line(config: Config, group: Group) -> str:
    nodes = nodes_of(config, group.name)
    waits = [f"{name} has succeeded" for name in group.after] + [_end(config, group, name) for name in group.after_end]
    waits += [f"{group.goes_on} of the same index has succeeded"] if group.goes_on else []
    return (
        f"{group.name:<13} {len(group.tasks):>5} job(s) of {nodes.nodes} node(s) with {nodes.gpus} GPU(s) and "
        f"{nodes.cpus} cores, {nodes.time_minutes} min; {'when ' + ' and '.join(waits) if waits else 'at once'}"
    )
