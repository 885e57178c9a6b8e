"""`plan --simulate`: how a run of these settings would go on GPUs that fail, beside one job that computes as much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from pydantic import Field, ValidationError

from launcher.published import HARDWARE_SHARE, LLAMA_3_RATE, RESTART
from launcher.simulation import HOUR, Cluster, Fault, Job, Outcome, best_interval, simulate, young_interval
from launcher.tasks import build_groups, build_tasks, nodes_of
from modularforge.config import Config, Section
from modularforge.cost import (
    BYTES_FP32,
    BYTES_STATE,
    GPU_SHARE_REACHED,
    USUAL_PEAK,
    flops_of_jobs,
    span,
    trained_parameters,
)
from modularforge.errors import ConfigError
from modularforge.mistakes import config_error
from modularforge.pipeline import STAGES

Phases = list[list[Job]]


class Assumptions(Section):
    """What a simulation takes for granted; `--assume NAME=VALUE` changes one of them."""

    gpus: int | None = Field(None, ge=1)
    """GPUs for all jobs; null is what `cluster` asks for the backbone or, at the same time, for all experts."""
    spare_gpus: int | None = Field(None, ge=0)
    """Beside them, to take the place of failed ones; null is 2 %, and a node at the least."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs that are away when one of them is repaired."""
    mfu: float = Field(GPU_SHARE_REACHED, gt=0, le=1)
    """Share of the peak that a training reaches; measured ones are in a run's metrics."""
    peak_teraflops: float = Field(USUAL_PEAK / 1e12, gt=0)
    """Peak of a GPU in bf16."""
    failures_per_gpu_hour: float = Field(LLAMA_3_RATE, ge=0)
    """Stops that nobody expected; Llama 3 had 419 in 54 days on 16,384 GPUs."""
    start_minutes: float = Field(2.0, ge=0)
    """From the first start of a job, or one after a queue, until it reads its data."""
    restart_minutes: float = Field(RESTART / 60, ge=0)
    """From a failure until the job reads its checkpoint."""
    hardware_share: float = Field(HARDWARE_SHARE, ge=0, le=1)
    """Of the failures, those after which a node is repaired."""
    repair_hours: float = Field(24.0, ge=0)
    """Until a node is back."""
    preemptions_per_gpu_day: float = Field(0.0, ge=0)
    """Stops with a warning, after which the job queues again."""
    queue_minutes: float = Field(0.0, ge=0)
    """Mean wait of a job before its first start and after a preemption."""
    stragglers_per_gpu_hour: float = Field(0.0, ge=0)
    """GPUs that become slow, and with them their job."""
    straggler_speed: float = Field(0.8, gt=0, le=1)
    """Their share of full speed."""
    straggler_hours: float = Field(3.0, ge=0)
    """Until they are found."""
    checkpoint_pause_seconds: float = Field(2.0, ge=0)
    """How long a training stops for a checkpoint, which is then written while it goes on."""
    checkpoint_minutes: float | None = Field(None, gt=0)
    """Training between checkpoints; null is Daly's optimum, a minute at the least."""
    checkpoint_requests: int = Field(20, ge=0)
    """Requests that a checkpoint makes at the store."""
    store_gigabytes_per_second: float = Field(100.0, gt=0)
    """What the store takes and gives in all."""
    store_requests_per_second: float = Field(3500.0, gt=0)
    """Requests that the store answers in all; S3 promises 3,500 writes for each partition of its keys."""
    link_gigabytes_per_second: float = Field(1.0, gt=0)
    """What one GPU's share of its node's network carries to the store."""
    seeds: int = Field(5, ge=2, le=1000)
    """Runs, of which mean and standard deviation are said."""


def assumptions_of(texts: Sequence[str]) -> Assumptions:
    """From `NAME=VALUE`; raises ConfigError for what is not known or no such number."""
    if wrong := [text for text in texts if "=" not in text]:
        raise ConfigError(f"--assume takes NAME=VALUE, such as gpus=1024, but was given {wrong[0]!r:.80}")
    values = dict(text.split("=", 1) for text in texts)
    known = ", ".join(Assumptions.model_fields)
    try:
        return Assumptions.model_validate({name: None if value == "null" else value for name, value in values.items()})
    except ValidationError as error:
        raise config_error(error, "--assume", lambda place: f"is unknown; there are {known}") from error


def cluster_of(config: Config, assumed: Assumptions) -> Cluster:
    """The cluster of a simulation."""
    gpus, restart = assumed.gpus or _gpus_asked(config), (assumed.restart_minutes * 60,) * 2
    start, preemptions = (assumed.start_minutes * 60,) * 2, assumed.preemptions_per_gpu_day / 24
    failures, slow = assumed.failures_per_gpu_hour, (assumed.straggler_hours * HOUR,) * 2
    hardware = failures * assumed.hardware_share
    faults = (
        Fault("hardware", hardware, restart, gives_up="node"),
        Fault("software", failures - hardware, restart),
        Fault("preemption", preemptions, start, is_warned=True, gives_up="all"),
        Fault("straggler", assumed.stragglers_per_gpu_hour, slow, slows_to=assumed.straggler_speed),
    )
    spare = max(assumed.gpus_per_node, math.ceil(gpus / 50)) if assumed.spare_gpus is None else assumed.spare_gpus
    return Cluster(
        gpus,
        tuple(fault for fault in faults if fault.per_gpu_hour),
        spare_gpus=spare,
        gpus_per_node=assumed.gpus_per_node,
        repair=assumed.repair_hours * HOUR,
        queue=assumed.queue_minutes * 60,
        start=assumed.start_minutes * 60,
        store=assumed.store_gigabytes_per_second * 1e9,
        store_requests=assumed.store_requests_per_second,
        link=assumed.link_gigabytes_per_second * 1e9,
    )


def _gpus_asked(config: Config) -> int:
    """What the run has at the same time if all its jobs get what `cluster` says."""
    asked = [
        nodes.nodes * nodes.gpus * (min(len(group.tasks), config.cluster.array_throttle or len(group.tasks)))
        for group in build_groups(build_tasks(config))
        for nodes in [nodes_of(config, group.name)]
    ]
    return max(1, *asked)


def phases_of(config: Config, cluster: Cluster, assumed: Assumptions) -> Phases:
    """The jobs that make the model: those of all GPUs one after another, experts side by side on equal shares."""
    flops, found = flops_of_jobs(config), list[list[Job]]()
    for group in build_groups(build_tasks(config)):
        stage = STAGES[group.tasks[0].stages[0]]
        if stage.baseline is not None or group.name == "evaluate":
            continue
        count = len(group.tasks)
        gpus = cluster.gpus if group.name == "backbone" else min(cluster.gpus_per_node, cluster.gpus)
        gpus = max(1, cluster.gpus // count) if count > 1 else gpus
        reads = 0.0 if group.name == "backbone" else _weights(config) * math.ceil(gpus / cluster.gpus_per_node)
        jobs = [_job(config, assumed, task.name, gpus, flops.get(task.name, 0.0), reads) for task in group.tasks]
        found += [jobs] if jobs[0].work else []
    if not found:
        raise ConfigError("nothing to simulate: the FLOPs of these jobs do not follow from the settings (task: speech)")
    return found


def one_job(config: Config, cluster: Cluster, assumed: Assumptions, phases: Phases) -> Job:
    """One synchronous training on all GPUs with as many FLOPs as all phases have."""
    work = sum(job.work * job.gpus for phase in phases for job in phase) / cluster.gpus
    first = _job(config, assumed, "backbone", cluster.gpus, 0.0, 0.0)
    return Job("one-job", cluster.gpus, work, first.pause, first.every, first.state_bytes, 0.0, first.requests, True)


def _job(config: Config, assumed: Assumptions, name: str, gpus: int, flops: float, reads: float) -> Job:
    stage, every = name.rsplit("-", 1)[0] if name not in STAGES else name, assumed.checkpoint_minutes
    return Job(
        name,
        gpus,
        flops / (gpus * assumed.mfu * assumed.peak_teraflops * 1e12),
        pause=assumed.checkpoint_pause_seconds,
        every=None if every is None else every * 60,
        state_bytes=BYTES_STATE * trained_parameters(config, stage),
        read_bytes=reads,
        requests=assumed.checkpoint_requests,
        in_background=True,
    )


def _weights(config: Config) -> float:
    """Bytes of the backbone, which every node of an expert reads."""
    return BYTES_FP32 * trained_parameters(config, "backbone")


def describe_simulation(config: Config, texts: Sequence[str] = ()) -> str:
    """What a launch of this run would meet, in text."""
    assumed = assumptions_of(texts)
    cluster = cluster_of(config, assumed)
    phases = phases_of(config, cluster, assumed)
    single = one_job(config, cluster, assumed, phases)
    rows = [["", "time to result", "without a fault", "goodput", "GPU-hours lost", "stops"]]
    for name, arranged in (("this run", phases), ("one job of all GPUs", [[single]])):
        outcomes = [simulate(cluster, arranged, seed) for seed in range(assumed.seeds)]
        rows.append([name, *_figures(outcomes, arranged)])
    said = ", ".join(f"{name} {_plain(value)}" for name, value in assumed if value is not None)
    lines = [_checkpoints(cluster, phase[0], len(phase)) for phase in [*phases, [single]]]
    short = _short(cluster, phases)
    return "\n".join([f"assumed on {_gpus(cluster.gpus)}: {said}", *lines, *_table(rows), *short, WHAT_IT_IS])


WHAT_IT_IS = (
    "A simulation with independent failures, the same share of the peak for all jobs, and no baselines or evaluation; "
    "docs/thousands.md says what it reproduces and what it leaves out."
)


def _short(cluster: Cluster, phases: Phases) -> list[str]:
    """A sentence where jobs wait and start for longer than they train, so that goodput is that of their starts."""
    around = cluster.queue + cluster.start
    named = [_named(phase[0], len(phase)) for phase in phases if phase[0].work < around]
    if not named:
        return []
    return [
        f"{', '.join(named)}: shorter than the {span(around)} that a job takes to queue and start (queue_minutes, "
        "start_minutes), so that goodput says little of how such a run goes; assume less of these, or simulate longer "
        "jobs"
    ]


def _named(job: Job, count: int) -> str:
    return job.name if count == 1 else f"{count} x {job.name.rsplit('-', 1)[0]}"


def _gpus(count: int) -> str:
    return f"{count:,} GPU" if count == 1 else f"{count:,} GPUs"


def _plain(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


def _checkpoints(cluster: Cluster, job: Job, count: int) -> str:
    mtbf, cost = cluster.mtbf(job.gpus), job.pause
    head = (
        f"{_named(job, count)}: {span(job.work)} on {_gpus(job.gpus)}, a checkpoint of {job.state_bytes / 1e9:.3g} GB"
    )
    if math.isinf(mtbf):
        return f"{head}, and no failures"
    best = f"{span(young_interval(cost, mtbf))} (Young), {span(best_interval(cost, mtbf))} (Daly)"
    return f"{head}, a failure every {span(mtbf)}: best every {best}; here every {span(cluster.interval(job))}"


def _figures(outcomes: list[Outcome], phases: Phases) -> list[str]:
    ideal = sum(max(job.work for job in phase) for phase in phases)
    times, shares = [outcome.seconds / HOUR for outcome in outcomes], [outcome.goodput for outcome in outcomes]
    lost, stops = [outcome.lost_gpu_hours for outcome in outcomes], [float(outcome.stops) for outcome in outcomes]
    return [
        f"{fmean(times):,.2f} ± {stdev(times):,.2f} h",
        f"{ideal / HOUR:,.2f} h",
        f"{fmean(shares):.1%} ± {stdev(shares):.1%}",
        f"{fmean(lost):,.1f} ± {stdev(lost):,.1f}",
        f"{fmean(stops):,.1f}",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
