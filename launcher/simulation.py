"""A discrete-event simulation (simpy, extra `simulate`) of jobs on GPUs that fail: what becomes of the GPUs' time.

A phase is jobs that run side by side, each when it finds its GPUs; the next phase begins when all of them have ended. A
job reads its state, trains, pauses for checkpoints, and goes back to the last one that was written when a GPU of it
fails. All jobs share one store. Times are in seconds, work in seconds at full speed on all GPUs of the job.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from modularforge.errors import ConfigError

if TYPE_CHECKING:
    import simpy

HOUR, DAY = 3600.0, 86400.0
LEAST_INTERVAL = 60.0
"""Between two checkpoints of a job that asks for the optimum: saves that cost nothing would be endless."""
MOST_IN_VAIN = 7.0
"""Mean times between failures that a restart or an interval may take: one in a thousand still comes through."""
Events = Generator[Any, Any, Any]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, for each GPU equally often and at any time (a Poisson process).

    A job stops for `seconds`, anything between the two equally likely: until it is noticed, understood and restarted. A
    fault with `is_warned` (preemption, maintenance) leaves time for a checkpoint. `gives_up` says what the job then has
    to find again: nothing, one node, which is repaired, or all of its GPUs, for which it queues. A fault that
    `slows_to` a share of full speed is a straggler: it stops nobody, and all GPUs of the job go at its pace.
    """

    name: str
    per_gpu_hour: float
    seconds: tuple[float, float]
    is_warned: bool = False
    gives_up: Literal["nothing", "node", "all"] = "nothing"
    slows_to: float = 0.0


@dataclass(frozen=True)
class Job:
    """A training: `pause` stops it at each checkpoint, every `every` seconds of work or at Daly's optimum.

    `state_bytes` and `requests` of a checkpoint go to the store while it waits, or while it trains (`in_background`);
    `read_bytes` are read beside the checkpoint at each start.
    """

    name: str
    gpus: int
    work: float
    pause: float = 0.0
    every: float | None = None
    state_bytes: float = 0.0
    read_bytes: float = 0.0
    requests: int = 0
    in_background: bool = False


@dataclass(frozen=True)
class Cluster:
    """GPUs of the jobs and spare ones, what befalls them, and the store (bytes and requests a second).

    `queue` is the mean wait of a start, exponentially distributed; `repair` is how long a node is away; `link` is what
    a GPU's share of its node's network carries.
    """

    gpus: int
    faults: tuple[Fault, ...] = ()
    spare_gpus: int = 0
    gpus_per_node: int = 8
    repair: float = 0.0
    queue: float = 0.0
    start: float = 0.0
    store: float = math.inf
    store_requests: float = math.inf
    link: float = math.inf

    def mtbf(self, gpus: int) -> float:
        """Mean seconds between the faults that take work from a job on so many GPUs; infinite without any."""
        rate = sum(fault.per_gpu_hour for fault in self.faults if not (fault.slows_to or fault.is_warned))
        return HOUR / (rate * gpus) if rate else math.inf

    def transfer(self, job: Job, size: float) -> float:
        """Seconds that some bytes of a job take when nobody else uses the store."""
        return max(size / self.store, size / (self.link * job.gpus), job.requests / self.store_requests)

    def interval(self, job: Job) -> float:
        """Seconds of work between checkpoints: as the job says, or the optimum for what a checkpoint costs it."""
        if job.every is not None:
            return job.every
        write = self.transfer(job, job.state_bytes)
        cost = job.pause if job.in_background else job.pause + write
        return max(best_interval(cost, self.mtbf(job.gpus)), write if job.in_background else 0.0, LEAST_INTERVAL)


def young_interval(save: float, mtbf: float) -> float:
    """Young's optimum of work between checkpoints (CACM 17(9), 1974): sqrt(2 save mtbf)."""
    return math.sqrt(2 * save * mtbf) if save else 0.0


def best_interval(save: float, mtbf: float) -> float:
    """Daly's optimum of work between checkpoints, in seconds (FGCS 22(3), 2006, eq. 37)."""
    if not save or math.isinf(mtbf):
        return mtbf if save else 0.0
    if save >= 2 * mtbf:
        return mtbf
    part = save / (2 * mtbf)
    return young_interval(save, mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - save


def expected_seconds(work: float, every: float, save: float, restart: float, mtbf: float) -> float:
    """Mean time of a job with checkpoints on a machine with Poisson failures (Daly 2006, eq. 20)."""
    return mtbf * math.exp(restart / mtbf) * math.expm1((every + save) / mtbf) * work / every


@dataclass
class Ran:
    """What became of a job: seconds from the beginning of all, and how long it was in each state.

    `lost` is work done twice, `slow` what stragglers cost, `down` with its GPUs but not yet training again, `waiting`
    without them.
    """

    job: Job
    began: float = 0.0
    ended: float = 0.0
    training: float = 0.0
    saving: float = 0.0
    down: float = 0.0
    waiting: float = 0.0
    lost: float = 0.0
    stops: int = 0

    @property
    def held(self) -> float:
        """GPU-seconds that the job had."""
        return self.job.gpus * (self.training + self.saving + self.down)

    @property
    def useful(self) -> float:
        """GPU-seconds of work at full speed that were needed."""
        return self.job.gpus * self.job.work

    @property
    def slow(self) -> float:
        """Seconds that stragglers cost."""
        return self.training - self.job.work - self.lost


@dataclass(frozen=True)
class Outcome:
    """A simulated run."""

    cluster: Cluster
    phases: tuple[tuple[Ran, ...], ...]

    @property
    def jobs(self) -> list[Ran]:
        """All jobs."""
        return [ran for phase in self.phases for ran in phase]

    @property
    def seconds(self) -> float:
        """Until the last job has ended."""
        return max(ran.ended for ran in self.jobs)

    @property
    def goodput(self) -> float:
        """Of the GPU time that jobs held, the share that was needed."""
        return sum(ran.useful for ran in self.jobs) / sum(ran.held for ran in self.jobs)

    @property
    def lost_gpu_hours(self) -> float:
        """GPU-hours that jobs held beyond those that were needed."""
        return sum(ran.held - ran.useful for ran in self.jobs) / HOUR

    @property
    def stops(self) -> int:
        """How often any job stopped."""
        return sum(ran.stops for ran in self.jobs)

    def seconds_of(self, share: float) -> float:
        """Until this share of the jobs of the last phase had ended, as `cluster.min_experts` waits for."""
        ended = sorted(ran.ended for ran in self.phases[-1])
        return ended[max(0, math.ceil(share * len(ended)) - 1)]


def simulate(cluster: Cluster, phases: Sequence[Sequence[Job]], seed: int = 0) -> Outcome:
    """Run the phases once; the same seed gives the same run. Raises ConfigError when a job could never end."""
    for job in {(job.gpus, job.work, job.every): job for phase in phases for job in phase}.values():
        _require_an_end(cluster, job)
    world = _World(cluster, seed)
    ran = world.environment.process(world.run(phases))
    world.environment.run(until=ran)
    phases_ran: list[list[Ran]] = ran.value  # type: ignore[assignment]
    return Outcome(cluster, tuple(tuple(phase) for phase in phases_ran))


def _require_an_end(cluster: Cluster, job: Job) -> None:
    if job.gpus > cluster.gpus:
        raise ConfigError(f"{job.name} needs {job.gpus} GPUs, but the cluster has {cluster.gpus}")
    mtbf = cluster.mtbf(job.gpus)
    away = max((fault.seconds[1] for fault in cluster.faults if not fault.slows_to), default=0.0)
    if max(away, min(cluster.interval(job), job.work)) > MOST_IN_VAIN * mtbf:
        raise ConfigError(
            f"{job.name} would never end: a failure comes every {mtbf:.3g} s on {job.gpus} GPUs, where a restart takes "
            f"up to {away:.3g} s and {cluster.interval(job):.3g} s lie between checkpoints; assume less of these"
        )


def _simpy() -> Any:
    try:
        return import_module("simpy")
    except ImportError as error:
        raise ConfigError(
            "simulations need the package simpy, which is not installed; install the extra: pip install "
            "'modularforge[simulate]'"
        ) from error


class _World:
    """The GPUs that nobody has, and the store, in simulated time."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        package = _simpy()
        self.cluster, self.seed, self.interrupt = cluster, seed, package.Interrupt
        self.environment: simpy.Environment = package.Environment()
        total = cluster.gpus + cluster.spare_gpus
        self.free: simpy.Container = package.Container(self.environment, total, total)
        self.busy_until = 0.0

    def run(self, phases: Sequence[Sequence[Job]]) -> Events:
        """All phases, one after another."""
        done = []
        for phase in phases:
            lives = [_Life(self, job) for job in phase]
            yield self.environment.all_of([life.process for life in lives])
            done.append([life.ran for life in lives])
        return done

    def transfer(self, job: Job, size: float) -> float:
        """Seconds until bytes of a job are at the store or from it, asked for now.

        The store serves one after another, each as fast as its nodes' links, and to the end even if the job stops.
        """
        now, cluster = self.environment.now, self.cluster
        self.busy_until = max(now, self.busy_until)
        self.busy_until += max(size / cluster.store, job.requests / cluster.store_requests)
        return max(self.busy_until - now, cluster.transfer(job, size))

    def repair(self, gpus: int) -> Events:
        """Give GPUs back when they are repaired."""
        yield self.environment.timeout(self.cluster.repair)
        yield self.free.put(gpus)


class _Life:
    """A job on its way: how much it has done, and how much of that is in a checkpoint."""

    def __init__(self, world: _World, job: Job) -> None:
        self.world, self.job, self.cluster, self.environment = world, job, world.cluster, world.environment
        self.random = random.Random(f"{world.seed}/{job.name}")
        self.every = self.cluster.interval(job)
        self.done, self.saved, self.speed = 0.0, 0.0, 1.0
        self.is_up, self.is_training = False, False
        self.state, self.since = "waiting", self.environment.now
        self.ran = Ran(job, self.environment.now)
        self.written, self.written_at = 0.0, 0.0
        self.process = self.environment.process(self.live())
        self.environment.process(self.be_hit())

    def live(self) -> Events:
        """Queue, start, train, and after each stop once more."""
        yield from self.find_gpus()
        outage = self.cluster.start
        while True:
            try:
                yield from self.attempt(outage)
                break
            except self.world.interrupt as stop:
                outage = yield from self.stopped(stop.cause)
        self.enter("over")
        self.is_up, self.ran.ended = False, self.environment.now
        yield self.world.free.put(self.job.gpus)

    def find_gpus(self) -> Events:
        """Wait in the queue, and until enough GPUs are free."""
        self.enter("waiting")
        if self.cluster.queue:
            yield self.environment.timeout(self.random.expovariate(1 / self.cluster.queue))
        yield self.world.free.get(self.job.gpus)

    def attempt(self, outage: float) -> Events:
        """From a start to the end, if nothing happens."""
        self.enter("down")
        self.is_up = True
        yield self.environment.timeout(outage)
        size = self.job.read_bytes + (self.job.state_bytes if self.saved else 0.0)
        yield self.environment.timeout(self.world.transfer(self.job, size))
        while self.saved < self.job.work:
            yield from self.train(min(self.every, self.job.work - self.done))
            yield from self.save()

    def train(self, work: float) -> Events:
        """Some work; a straggler's pace may change meanwhile."""
        self.enter("training")
        target = self.job.work if self.done + work >= self.job.work else self.done + work
        while self.done < target:
            begin, speed, before = self.environment.now, self.speed, self.done
            self.is_training = True
            try:
                yield self.environment.timeout((target - before) / speed)
                self.done = target
            except self.world.interrupt as stop:
                self.done = min(target, before + speed * (self.environment.now - begin))
                if stop.cause is not None:
                    raise
            finally:
                self.is_training = False

    def save(self) -> Events:
        """A checkpoint; one in the background waits for the one before, and the last is waited for."""
        self.enter("saving")
        if self.written_at > self.environment.now:
            yield self.environment.timeout(self.written_at - self.environment.now)
        self.saved = self.written
        if self.job.pause:
            yield self.environment.timeout(self.job.pause)
        seconds = self.world.transfer(self.job, self.job.state_bytes)
        self.written, self.written_at = self.done, self.environment.now + seconds
        if not self.job.in_background or self.done >= self.job.work:
            yield self.environment.timeout(seconds)
            self.saved = self.written

    def stopped(self, fault: Fault) -> Events:
        """Account for a stop and find what was given up; returns how long the job is down."""
        self.enter("down")
        self.is_up, self.speed = False, 1.0
        self.ran.stops += 1
        if fault.is_warned:
            self.saved = self.done
        elif self.written_at <= self.environment.now:
            self.saved = self.written
        self.ran.lost += self.done - self.saved
        self.done = self.written = self.saved
        self.written_at = 0.0
        if fault.gives_up == "node":
            gpus = min(self.job.gpus, self.cluster.gpus_per_node)
            self.environment.process(self.world.repair(gpus))
            yield self.world.free.get(gpus)
        elif fault.gives_up == "all":
            yield self.world.free.put(self.job.gpus)
            yield from self.find_gpus()
        return self.random.uniform(*fault.seconds)

    def be_hit(self) -> Events:
        """Faults of the job's GPUs while it has them."""
        rates = [fault.per_gpu_hour * self.job.gpus / HOUR for fault in self.cluster.faults]
        while sum(rates) and self.process.is_alive:
            yield self.environment.timeout(self.random.expovariate(sum(rates)))
            fault = self.random.choices(self.cluster.faults, rates)[0]
            if self.is_up and fault.slows_to:
                self.environment.process(self.be_slow(fault))
            elif self.is_up:
                self.process.interrupt(fault)

    def be_slow(self, fault: Fault) -> Events:
        """A straggler until it is found, or the job starts anew without it."""
        stops = self.ran.stops
        self.pace(fault.slows_to)
        yield self.environment.timeout(self.random.uniform(*fault.seconds))
        if stops == self.ran.stops:
            self.pace(1.0)

    def pace(self, speed: float) -> None:
        """Go on at another speed; the slowest counts until it is found."""
        self.speed = speed
        if self.is_training:
            self.process.interrupt(None)

    def enter(self, state: str) -> None:
        """Book the time since the last change."""
        spent = self.environment.now - self.since
        if self.state != "over":
            setattr(self.ran, self.state, getattr(self.ran, self.state) + spent)
        self.state, self.since = state, self.environment.now
