"""What a run costs before anything runs: FLOPs and tokens of its parts, and on this machine time, disk and memory.

FLOPs follow from the shape alone. How many of them a machine does in a second says a short matrix product of the
model's own shape, as large as one in a training step, of which a training reaches a share; a run that goes on knows
better after each part (`Parts`). All of it is about right, within a factor of two. Only what asks the machine loads
torch.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

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
GPU_SHARE_REACHED = 0.4  # of a GPU's peak; what large models reach (PaLM, arXiv 2204.02311, table 3: 0.21 to 0.46)
USUAL_GPU, USUAL_PEAK = "A100", 312e12
# FLOPs a second in bf16 of dense matrices, by words in a device's name, the longer first (torchtitan, tools/utils.py).
PEAKS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2.25e15, "A100": 312e12,
         "L40S": 362e12, "MI300X": 1300e12, "MI325X": 1300e12, "MI250X": 191.5e12}  # fmt: skip
PEAK_SIDE, PEAK_SECONDS = 512, 0.02
# A machine that is busy at one moment is free at another: so many tries, at least so many seconds apart.
BUSY = 1.5  # others for each processor, from which on it is told
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
    read += config.experts.statistics_tokens if is_counted else 0
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
    waiting: float = 0.0
    """How many others compute on each of its processors now, beside this program."""


def this_machine(config: Config) -> Machine:
    """The machine that this program runs on, after a product of the model's own shape."""
    import torch

    model = config.model
    tokens = min(MEASURED_TOKENS, config.backbone.batch_size * model.context_length)
    rate = matrix_rate(tokens, model.width, model.ffn_width, MEASURED_SECONDS)
    if torch.cuda.is_available():
        return Machine(torch.cuda.get_device_name(), rate * SHARE_REACHED)
    count = torch.get_num_threads()
    processor = f"{count} thread{'s' if count > 1 else ''} of this processor"
    return Machine(processor, rate * SHARE_REACHED, _others(count))


def _others(threads: int) -> float:
    """Of the last minute, how many others wait for each processor that so many threads of ours want to have."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except OSError:  # some sandboxes do not tell
        return 0.0
    return max(0.0, (load + threads) / processors - 1)


def matrix_rate(rows: int, inner: int, columns: int, seconds: float) -> float:
    """FLOPs a second of products [rows, inner] x [inner, columns] for some time, on the device that trainings get."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(rows, inner, device=device, dtype=dtype)
    right = torch.ones(inner, columns, device=device, dtype=dtype)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    torch.mm(left, right)  # the first one wakes threads and libraries
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        wait()
        best = min(best, time.perf_counter() - start)  # what else the machine does is not asked
    return 2.0 * rows * inner * columns / best


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
        self.rate = max(self.rate, matrix_rate(PEAK_SIDE, PEAK_SIDE, PEAK_SIDE, PEAK_SECONDS))
        self._tries, self._last_try = self._tries - 1, time.monotonic()


@functools.cache
def device_peak() -> Peak:
    """That of this process's device, which all its jobs know better and better."""
    return Peak()


def describe_cost(config: Config, machine: Machine) -> str:
    """What a whole run costs here, in two lines of text; empty where the shape does not tell."""
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
        f"{sum(part.tokens for part in parts):,} tokens are trained on{_busy(machine)}\n"
        f"about {size(disk_bytes(config))} of disk for models and checkpoints, beside the data, and "
        f"{size(memory_bytes(config))} of memory"
    )


def _busy(machine: Machine) -> str:
    """A warning where what was measured is of moments that other programs left."""
    if machine.waiting < BUSY:
        return ""
    return f"; other programs compute here now, beside which it takes up to {1 + machine.waiting:.0f} times as long"


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
        self._rate, self._measure = machine.flops_per_second if machine else 0.0, measure
        self._done, self._seconds = 0.0, 0.0

    def line(self, stage: str, index: int | None = None) -> str:
        """`part 3 of 9: expert-0, about 12 min left`."""
        place = self._place(JobName(stage, index))
        left = sum(part.flops for part in self.parts[place:])
        if self._measure and not self._seconds:
            self._rate = max(self._rate, self._measure().flops_per_second)
        rate = self._done / self._seconds if self._seconds else self._rate
        rest = f", about {span(left / rate)} left" if rate and left else ""
        return f"part {place + 1} of {len(self.parts)}: {self.parts[place].job}{rest}"

    def took(self, stage: str, index: int | None, seconds: float) -> None:
        """A part was made in so many seconds."""
        if flops := self.parts[self._place(JobName(stage, index))].flops:
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
