"""What a run costs before anything runs: FLOPs and tokens of its parts, and on this machine time, disk and memory.

FLOPs follow from the shape alone. How many of them a machine does in a second says a short matrix product of the
model's own shape, as large as one in a training step, of which a training reaches a share: its best try where the
machine is left alone, the mean of all tries beside other programs. A run that goes on knows better after each part
(`Parts`). All of it is about right, within a factor of two. Only what asks the machine loads torch.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from modularforge.config import Config, PhaseConfig
from modularforge.model.sizes import (
    Sizes,
    adapter_parameters,
    ffn_parameters,
    model_sizes,
    shared_parameters,
    with_own_rows,
)
from modularforge.pipeline import ROUNDS, STAGES, JobName, Stage, wanted_stages
from modularforge.routing.solvers import widening_of

# Of what a matrix product of the model's shape reaches. Steps of the quickstart, `small` and `default` had, on two
# busy cores, 0.15 to 0.38, 0.11 to 0.36 and 0.37 to 0.76.
SHARE_REACHED = 0.4
MEASURED_TOKENS, MEASURED_SECONDS = 2048, 0.15
BUSY = 2.0  # how much slower than its best the machine is by the mean of all tries, from which on it is told
TOLD_SECONDS = 60  # of a run, below which it is not
# Threads that wait for one that another program keeps off its processor make a few tries of milliseconds into seconds.
LEAST_TRIES, MOST_SECONDS = 50, 1.5
GPU_SHARE_REACHED = 0.4  # of a GPU's peak; what large models reach (PaLM, arXiv 2204.02311, table 3: 0.21 to 0.46)
USUAL_GPU, USUAL_PEAK = "A100", 312e12
# FLOPs a second in bf16 of dense matrices, by words in a device's name, the longer first (torchtitan, tools/utils.py).
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2.25e15, "A100": 312e12,
         "L40S": 362e12, "MI300X": 1300e12, "MI325X": 1300e12, "MI250X": 191.5e12}  # fmt: skip
PEAK_SIDE, PEAK_SECONDS = 512, 0.02
# A machine that is busy at one moment is free at another: so many tries, at least so many seconds apart.
PEAK_TRIES, SECONDS_BETWEEN_TRIES = 10, 1.0
# What a model reads where it is measured: the text, as much behind a switch and mixed by an eighth each, read twice.
EVALUATION_READS = 1.5
OF_EXPERTS = ("expert", *ROUNDS)
BYTES_FP32, BYTES_STATE = 4, 12  # a weight, and with its two moments in a checkpoint
# Kept for the way back, in bytes by token and layer: inputs of products, norms and the FFN (arXiv 2205.05198, eq. 2).
KEPT_WIDTHS, KEPT_FFN_WIDTHS, KEPT_LOGITS = 10, 4, 3


@dataclass(frozen=True)
class Part:
    """One artifact of a run, in FLOPs of its training and measuring, and tokens trained on."""

    job: JobName
    flops: float
    tokens: int
    made_by: str
    """The job that makes it, by itself or among others."""


def parts_of(config: Config) -> list[Part]:
    """The parts of a run in the order in which `run-all` makes them."""
    return [
        Part(JobName(stage.name, index), part_flops(config, stage), _phase_tokens(config, stage), stage.job)
        for stage in in_order(config)
        for index in stage.indices(config)
    ]


def in_order(config: Config) -> list[Stage]:
    """The wanted rows, what the model is compared with behind the model."""
    return sorted(wanted_stages(config), key=lambda stage: (stage.job == "evaluate", stage.baseline is not None))


def flops_of_jobs(config: Config) -> dict[str, float]:
    """FLOPs of each job of a run by its name, `expert-3`."""
    found: dict[str, float] = {}
    for part in parts_of(config):
        name = str(JobName(part.made_by, part.job.index))
        found[name] = found.get(name, 0.0) + part.flops
    return found


def training_flops_per_token(config: Config, stage: str) -> float:
    """FLOPs of a step of training by token (a multiply and an add each); 0 where the shape does not tell (speech)."""
    row = STAGES.get(stage)
    if config.task == "speech" or row is None or row.phase is None:
        return 0.0
    sizes = sizes_of(config, stage)
    if stage == "calibrate":  # gains alone learn: a way forth, and one back without gradients of matrices
        return 2.0 * sizes.flops_per_token
    if stage == "expert":
        return 2.0 * sizes.flops_per_token + _flops_of_learning(config)
    return float(sizes.training_flops_per_token)


def part_flops(config: Config, stage: Stage) -> float:
    """FLOPs of one artifact of a stage: its training with its validations and statistics, or its measuring."""
    if stage.name == "evaluate":
        return _evaluation_flops(config)
    if stage.phase is None or config.task == "speech":
        return 0.0
    phase, forward = stage.phase(config), sizes_of(config, stage.name).flops_per_token
    training, is_counted = config.training, stage.name in ("backbone", "expert")
    read = (phase.steps // training.validate_every + 1) * training.validation_tokens
    read += config.gathered_tokens if is_counted else 0
    return _phase_tokens(config, stage) * training_flops_per_token(config, stage.name) + read * forward


def _phase_tokens(config: Config, stage: Stage) -> int:
    phase: PhaseConfig | None = stage.phase(config) if stage.phase else None
    return 0 if phase is None else phase.steps * phase.batch_size * config.model.context_length


def _flops_of_learning(config: Config) -> float:
    """Of gradients of the matrices that an expert trains, by token; those of adapters also cost their way forth."""
    if config.experts.kind == "lora":
        return 6.0 * adapter_parameters(config.model, config.experts.lora.modules, config.experts.lora.rank)
    return 2.0 * config.model.layers * ffn_parameters(config.model)


def sizes_of(config: Config, stage: str) -> Sizes:
    """Sizes of the model that a stage trains or makes."""
    model, vocab_size, assembly = config.model, config.data.vocab_size, config.assembly
    visited = min(assembly.experts_per_token, config.assembled_experts)
    if stage in ("assemble", "calibrate") and config.experts.kind == "ffn":
        shape = widening_of(config, model, config.experts.count).widened if assembly.router == "evidence" else model
        return with_rows(config, model_sizes(shape, vocab_size, config.assembled_experts, visited, model), visited)
    if stage in ("joint", "joint_evidence", "btx"):
        visited = min(visited, config.joint_experts)
        joint = model_sizes(model, vocab_size, config.joint_experts, visited)
        return with_rows(config, joint, visited) if stage == "joint_evidence" else joint
    if stage == "dense_wide":
        model = model.model_copy(update={"ffn_width": visited * model.ffn_width})
    return model_sizes(model, vocab_size)


def with_rows(config: Config, sizes: Sizes, visited: int) -> Sizes:
    """The same with embeddings and heads that experts have for themselves."""
    if not config.own_row_parts:
        return sizes
    model, matrix = config.model, config.data.vocab_size * config.model.width
    each = shared_parameters(model, config.data.vocab_size, config.own_row_parts)
    return with_own_rows(sizes, each, model.tied_head, matrix, config.experts.count, visited)


def _evaluation_flops(config: Config) -> float:
    """All models read the test text of all domains."""
    if config.task == "speech":
        return 0.0
    text = max(len(config.data.sources), 1) * config.evaluation.tokens_per_domain * EVALUATION_READS
    rows = [stage for stage in wanted_stages(config) if stage.is_measured]
    models = sum(sizes_of(config, stage.name).flops_per_token * len(stage.indices(config)) for stage in rows)
    return text * models


def disk_bytes(config: Config) -> float:
    """Of models and the checkpoints that are kept, at most; prepared data is not known before it is read."""
    return sum(
        len(stage.indices(config)) * _bytes_of_one(config, stage)
        for stage in wanted_stages(config)
        if stage.is_measured and stage.name != "calibrate" and config.task != "speech"
    )


def _bytes_of_one(config: Config, stage: Stage) -> float:
    state = BYTES_STATE * config.training.keep_checkpoints if stage.phase else 0
    return (BYTES_FP32 + state) * trained_parameters(config, stage.name)


def memory_bytes(config: Config) -> float:
    """Of the largest training, in one process: weights, gradients, moments, and what is kept for the way back."""
    trained = [stage for stage in wanted_stages(config) if stage.phase and config.task != "speech"]
    return max((_memory(config, stage) for stage in trained), default=0.0)


def _memory(config: Config, stage: Stage) -> float:
    assert stage.phase is not None
    phase, model = stage.phase(config), config.model
    tokens = phase.batch_size // phase.accumulation_steps * model.context_length
    layer = KEPT_WIDTHS * model.width + KEPT_FFN_WIDTHS * model.ffn_width
    kept = tokens * (model.layers * layer + KEPT_LOGITS * config.data.vocab_size)
    weights = BYTES_FP32 * (sizes_of(config, stage.name).parameters + kept)
    return weights + BYTES_STATE * trained_parameters(config, stage.name)


def trained_parameters(config: Config, stage: str) -> int:
    """Parameters that a stage trains, or writes where it trains none."""
    experts, model, vocab_size = config.experts, config.model, config.data.vocab_size
    ffn, rows = model.layers * ffn_parameters(model), model.layers * model.width
    if stage in ("joint_lora", "joint_lora_wide") or (stage in OF_EXPERTS and experts.kind == "lora"):
        times = experts.count if stage == "joint_lora_wide" else 1
        shared = shared_parameters(model, vocab_size, experts.unfreeze) if stage in OF_EXPERTS else 0
        return times * adapter_parameters(model, experts.lora.modules, experts.lora.rank) + shared
    if stage in OF_EXPERTS:
        return ffn + (rows if experts.anchored else 0) + shared_parameters(model, vocab_size, experts.unfreeze)
    if stage == "calibrate" and experts.kind == "ffn":
        parts = ["norms"] * config.calibration.norms + ["embeddings", "attention", "head"] * config.calibration.shared
        return config.assembled_experts * rows + shared_parameters(model, vocab_size, parts)
    if stage in ("joint", "joint_evidence") and config.joint.freeze_shared:
        return config.joint_experts * (ffn + rows)
    if stage == "btx" and config.btx.trains != "all":
        routers = config.joint_experts * rows
        shared = sizes_of(config, stage).parameters - config.joint_experts * ffn - routers
        return routers + (shared if config.btx.trains == "shared" else 0)
    return sizes_of(config, stage).parameters


@dataclass(frozen=True)
class Machine:
    """What computes here, and how many FLOPs of a training it does in a second."""

    name: str
    flops_per_second: float
    """Left alone, by the best try."""
    pace: float = 0.0
    """Now, beside what else computes; 0 where that is the same."""
    single: float = 0.0
    """Now, with a single thread; 0 where that is not known, or no better."""

    @property
    def now(self) -> float:
        """FLOPs a second of a training that begins now."""
        return self.pace or self.flops_per_second


def this_machine(config: Config) -> Machine:
    """The machine that this program runs on, after products of the model's own shape."""
    import torch

    if torch.cuda.is_available():
        return Machine(torch.cuda.get_device_name(), _rates(config).best * SHARE_REACHED)
    count, rates = torch.get_num_threads(), _rates(config)
    name = f"{count} thread{'s' if count > 1 else ''} of this processor{_crowd()}"
    single = _rates_of_one_thread(config) if count > 1 else rates
    best = max(rates.best, single.best)  # where threads kept each other waiting in every try, one alone knows better
    if best < BUSY * rates.mean:
        return Machine(name, best * SHARE_REACHED)
    better = single.mean if single.mean > BUSY * rates.mean else 0.0
    return Machine(name, best * SHARE_REACHED, rates.mean * SHARE_REACHED, better * SHARE_REACHED)


def _crowd() -> str:
    """What makes an estimate rough: more programs want to compute now than there are cores."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f", at load {load:.0f} on {cores} cores, so this is rough" if load > cores + 0.5 else ""


class Rates(NamedTuple):
    """FLOPs a second: of the best of some tries, and of all of them."""

    best: float
    mean: float


def _rates(config: Config) -> Rates:
    return matrix_rates(*_product(config), MEASURED_SECONDS, LEAST_TRIES)


def _product(config: Config) -> tuple[int, int, int]:
    model = config.model
    return min(MEASURED_TOKENS, config.backbone.batch_size * model.context_length), model.width, model.ffn_width


def _rates_of_one_thread(config: Config) -> Rates:
    """As numpy multiplies: torch may split sums in another way once its threads were changed, even if set back."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    rows, inner, columns = _product(config)
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    with threadpool_limits(1, user_api="blas"):
        return _rates_of(lambda: left @ right, 2.0 * rows * inner * columns, MEASURED_SECONDS, LEAST_TRIES)


def matrix_rates(rows: int, inner: int, columns: int, seconds: float, least: int = 1) -> Rates:
    """Those of products [rows, inner] x [inner, columns], on the device that trainings get.

    For some seconds, and longer until there were the least tries, but no longer than `MOST_SECONDS`.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _rates_of(multiply, 2.0 * rows * inner * columns, seconds, least)


def _rates_of(multiply: Callable[[], object], flops: float, seconds: float, least: int) -> Rates:
    multiply()  # the first one wakes threads and libraries
    best, tries, begin, now = float("inf"), 0, time.perf_counter(), 0.0
    while not tries or now - begin < seconds or (tries < least and now - begin < MOST_SECONDS):
        start = time.perf_counter()
        multiply()
        now, tries = time.perf_counter(), tries + 1
        best = min(best, now - start)
    return Rates(flops / best, flops * tries / (now - begin))


class Peak:
    """The most FLOPs a second that the device of this process does: known by a GPU's name, else measured.

    The best of several short tries over time, since another program may have the processor in any of them; and what
    was reached is reached, so that no share is above 1.
    """

    def __init__(self) -> None:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        known = next((peak for words, peak in PEAKS.items() if words in name), None)
        self.rate, self._tries, self._last_try = known or 0.0, 0 if known else PEAK_TRIES, 0.0
        if not known:
            self._try()

    def share(self, flops_per_second: float) -> float:
        """Which share of it is reached by so many FLOPs a second; measures again now and then."""
        if self._tries and time.monotonic() - self._last_try >= SECONDS_BETWEEN_TRIES:
            self._try()
        self.rate = max(self.rate, flops_per_second)
        return flops_per_second / self.rate

    def _try(self) -> None:
        self.rate = max(self.rate, matrix_rates(PEAK_SIDE, PEAK_SIDE, PEAK_SIDE, PEAK_SECONDS).best)
        self._tries, self._last_try = self._tries - 1, time.monotonic()


@functools.cache
def device_peak() -> Peak:
    """That of this process's device, which all its jobs know better and better."""
    return Peak()


def describe_cost(config: Config, machine: Machine) -> str:
    """What a whole run costs here, in two lines, three on a busy machine; empty where the shape does not tell."""
    parts = parts_of(config)
    flops = sum(part.flops for part in parts)
    if not flops:
        return ""
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.job.stage] = seconds.get(part.job.stage, 0.0) + part.flops / machine.flops_per_second
    counts = Counter(part.job.stage for part in parts)
    listed = ", ".join(
        f"{job if counts[job] == 1 else f'{counts[job]} x {job}'} {span(found)}"
        for job, found in seconds.items()
        if found
    )
    return (
        f"about {span(flops / machine.flops_per_second)} here ({machine.name}): {listed}; "
        f"{sum(part.tokens for part in parts):,} tokens are trained on\n{_busy(machine, flops)}"
        f"about {size(disk_bytes(config))} of disk for models and checkpoints, beside the data, and "
        f"{size(memory_bytes(config))} of memory"
    )


def _busy(machine: Machine, flops: float) -> str:
    """How long it takes beside what else computes, as a line, where that is much longer."""
    if not machine.pace or flops / machine.pace < TOLD_SECONDS:
        return ""
    single = f", about {span(flops / machine.single)} with OMP_NUM_THREADS=1" if machine.single else ""
    return f"beside what else computes here, about {span(flops / machine.pace)} at the pace of this moment{single}\n"


def gpu_hours(config: Config, jobs: Iterable[str]) -> float:
    """Hours of one `USUAL_GPU` for some jobs of a run."""
    wanted = {*jobs}
    flops = sum(part.flops for part in parts_of(config) if part.made_by in wanted)
    return flops / (USUAL_PEAK * GPU_SHARE_REACHED) / 3600


class Parts:
    """Tells which part of a run comes next and how long the rest will take.

    As the machine is thought to do it, then as it did the parts before.
    """

    def __init__(
        self,
        config: Config,
        machine: Machine | None = None,
        skipped: Collection[str] = (),
        measure: Callable[[], Machine] | None = None,
    ) -> None:
        """`measure` looks at the machine again until a part has shown it: other programs may have had it before."""
        self.parts = [part for part in parts_of(config) if part.job.stage not in skipped]
        self._rate, self._measure = machine.now if machine else 0.0, measure
        self._done, self._seconds = 0.0, 0.0

    def line(self, stage: str, index: int | None = None, done: float = 0.0) -> str:
        """`part 3 of 9: expert-0, about 12 min left`; a share of this part may be done by an earlier start."""
        place = self._place(JobName(stage, index))
        left = sum(part.flops for part in self.parts[place:]) - done * self.parts[place].flops
        if self._measure and not self._seconds:
            self._rate = self._measure().now
        rate = self._done / self._seconds if self._seconds else self._rate
        rest = f", about {span(left / rate)} left" if rate and left else ""
        return f"part {place + 1} of {len(self.parts)}: {self.parts[place].job}{rest}"

    def took(self, stage: str, index: int | None, seconds: float, done: float = 0.0) -> None:
        """A part was made in so many seconds, but for the share that an earlier start had done."""
        if flops := (1 - done) * self.parts[self._place(JobName(stage, index))].flops:
            self._done, self._seconds = self._done + flops, self._seconds + seconds

    def _place(self, job: JobName) -> int:
        return next(place for place, part in enumerate(self.parts) if part.job == job)


def span(seconds: float) -> str:
    """A length of time in one unit: `40 s`, `12 min`, `3.4 h`, `12 days`."""
    for length, unit in ((2 * 86400, "days"), (5400, "h"), (90, "min")):
        if seconds >= length:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{value:.1f} {unit}" if value < 10 and unit == "h" else f"{value:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"


def size(count: float) -> str:
    """Bytes in one unit: `25 MB`, `1.3 GB`."""
    for length, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= length:
            return f"{count / length:.1f} {unit}" if count < 10 * length else f"{count / length:.0f} {unit}"
    return f"{count / 1e6:.1f} MB"
