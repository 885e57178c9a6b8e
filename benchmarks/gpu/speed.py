"""Slice b: tokens a second and MFU of what the project trains, beside others at the same shape in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.grouped import use_grouped
from benchmarks.gpu.parts import Part, Values
from benchmarks.gpu.peers import Seconds, peers
from benchmarks.gpu.timing import Shape, forget, our_steps
from modularforge.config import ExpertsConfig, ModelConfig
from modularforge.cost import device_peak
from modularforge.experts.ffn.training import expert_model
from modularforge.experts.trainable import Trainable, trainable
from modularforge.model.backbone import build_backbone
from modularforge.model.folder import backbone_tensors
from modularforge.model.hub_config import backbone_config
from modularforge.model.moe import build_moe
from modularforge.model.sizes import ffn_parameters, model_sizes
from modularforge.tasks.text import TEXT
from modularforge.training.distributed import default_device
from modularforge.training.losses import RoutedLoss, routed
from modularforge.training.meter import peak_memory_bytes

#                width layers heads context batch vocabulary experts every times compiles
SHAPES = [Shape(512, 8, 8, 1024, 64, 32768, 8, 10, 3, True), Shape(1024, 16, 16, 1024, 24, 32768, 8, 5, 3, True),
          Shape(2048, 16, 16, 1024, 8, 32768, 4, 5, 3, True)]  # fmt: skip
TINY_SHAPES = [Shape(32, 2, 4, 32, 4, 256, 4, 1, 2, False), Shape(48, 2, 4, 32, 4, 256, 4, 1, 2, False)]
ROUNDS = 2
ACTIVE = 2
"""Experts that a token of the mixture visits."""
PROFILED, ROWS = 1, 25
"""Which of the shapes is profiled, and lines of its table."""
OURS, PLAIN_EXPERT, ANCHORED, MIXTURE, GROUPED, WIDE = (
    "backbone", "expert", "anchored expert", "joint mixture", "joint mixture, grouped", "dense of its active FLOPs",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is timed, with FLOPs of its training by token."""

    seconds: Callable[[], list[float]]
    flops: float


def speed_parts(tiny: bool) -> list[Part]:
    """A part for each width, and a profile."""
    shapes = TINY_SHAPES if tiny else SHAPES
    widths = [Part("b", f"width-{shape.width}", partial(speed, shape), 240) for shape in shapes]
    return [*widths, Part("b", "profile", partial(profiled, shapes[PROFILED]), 90)]


def speed(shape: Shape, _seconds: float) -> Values:
    """Each case's tokens a second, taken in turns, and the ratios that have targets."""
    cases, peak = cases_of(shape), device_peak().rate
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory: dict[str, int] = {}
    failed: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name in [name for name in cases if name not in failed]:
            forget()
            try:
                seconds[name] += cases[name].seconds()
            except Exception as error:  # one that does not fit, or cannot be compiled, must not hide the others
                failed[name] = f"{type(error).__name__}: {error}"[:500]
            memory[name] = peak_memory_bytes(default_device())
    median = {name: statistics.median(found) for name, found in seconds.items() if name not in failed}
    rows = {name: _row(shape, cases[name], median[name], memory[name], peak) for name in median}
    return {"cases": rows, "failed": failed, "targets": targets(median, cases, rows), "seconds": seconds}


def _row(shape: Shape, case: Case, seconds: float, memory: int, peak: float) -> Values:
    speed = shape.tokens / seconds
    return {"tokens_per_second": speed, "mfu": speed * case.flops / peak, "memory_gb": memory / 1e9}


def targets(median: dict[str, float], cases: dict[str, Case], rows: Values) -> Values:
    """What the issue asks for, as (value, relation, bound), of those cases that ran."""
    found: Values = {}
    own = {name: value for name, value in median.items() if name.startswith(OURS)}
    others = [value for name, value in median.items() if name.split(",")[0] in peers()]
    if own:
        best = min(own, key=own.__getitem__)
        found["backbone, MFU"] = (rows[best]["mfu"], ">=", 0.5)
        if others:
            found["backbone, of the speed of the best peer"] = (min(others) / own[best], ">=", 1.1)
    for name in (PLAIN_EXPERT, ANCHORED):
        if name in median and OURS in median:
            arithmetic = cases[name].flops / cases[OURS].flops
            found[f"{name}, of its arithmetic beside the backbone"] = (
                median[name] / median[OURS] / arithmetic, "<=", 1.05,
            )  # fmt: skip
    if MIXTURE in median and WIDE in median:
        found["joint mixture, of the dense model's speed"] = (median[WIDE] / median[MIXTURE], ">=", 0.8)
    return found


def cases_of(shape: Shape) -> dict[str, Case]:
    """All that is timed at one shape, by name."""
    full = _flops(shape)
    cases = {name: Case(partial(_ours, make, shape, False), flops) for name, (make, flops) in _trained(shape).items()}
    if shape.compiles:
        cases |= {f"{OURS}, compiled": Case(partial(_ours, backbone, shape, True), full)}
    for name, seconds in peers().items():
        cases |= _peer(name, seconds, shape, full)
    return cases


def _peer(name: str, seconds: Seconds, shape: Shape, flops: float) -> dict[str, Case]:
    found = {name: Case(partial(seconds, shape, False), flops)}
    return {**found, f"{name}, compiled": Case(partial(seconds, shape, True), flops)} if shape.compiles else found


def _ours(make: Callable[[Shape], Trainable], shape: Shape, compiles: bool) -> list[float]:
    torch.manual_seed(0)
    torch.compiler.reset()
    return our_steps(make(shape), shape, compiles)


def _trained(shape: Shape) -> dict[str, tuple[Callable[[Shape], Trainable], float]]:
    """What the project trains, with FLOPs by token: two passes for all, the third for what learns."""
    model, own = shape.model, 2 * shape.model.layers * ffn_parameters(shape.model)
    pair = model_sizes(model, shape.vocabulary, 2, 2)
    of_mixture = model_sizes(model, shape.vocabulary, shape.experts, ACTIVE).training_flops_per_token
    return {
        OURS: (backbone, _flops(shape)),
        PLAIN_EXPERT: (partial(expert, anchored=False), 2 * _flops(shape) / 3 + own),
        ANCHORED: (partial(expert, anchored=True), 2 * pair.flops_per_token + own),
        MIXTURE: (mixture, of_mixture),
        GROUPED: (grouped_mixture, of_mixture),
        WIDE: (wide, model_sizes(_widened(shape), shape.vocabulary).training_flops_per_token),
    }


def _flops(shape: Shape) -> float:
    return float(model_sizes(shape.model, shape.vocabulary).training_flops_per_token)


def _widened(shape: Shape) -> ModelConfig:
    return shape.model.model_copy(update={"ffn_width": ACTIVE * shape.model.ffn_width})


def backbone(shape: Shape) -> Trainable:
    """The dense model."""
    return trainable(build_backbone(shape.model, shape.vocabulary), TEXT.loss)


def wide(shape: Shape) -> Trainable:
    """The dense model with as wide an FFN as a token of the mixture visits."""
    return trainable(build_backbone(_widened(shape), shape.vocabulary), TEXT.loss)


def expert(shape: Shape, anchored: bool) -> Trainable:
    """An expert in its own model, frozen but for its FFN."""
    found = backbone_tensors(build_backbone(shape.model, shape.vocabulary)).items()
    tensors = {name: tensor for name, tensor in found if isinstance(tensor, Tensor)}
    directions = [torch.zeros(shape.width)] * shape.layers if anchored else None
    values = backbone_config(shape.model, shape.vocabulary)
    decoder = expert_model(tensors, values, ExpertsConfig(anchored=anchored), directions).whole()
    return trainable(decoder, RoutedLoss(decoder, TEXT.loss, 1e-3) if anchored else TEXT.loss)


def mixture(shape: Shape) -> Trainable:
    """The joint baseline's model."""
    return routed(build_moe(shape.model, shape.vocabulary, shape.experts, ACTIVE), TEXT.loss, 1e-3, 1e-2)


def grouped_mixture(shape: Shape) -> Trainable:
    """The same model by grouped products."""
    model = use_grouped(build_moe(shape.model, shape.vocabulary, shape.experts, ACTIVE))
    return routed(model, TEXT.loss, 1e-3, 1e-2)


def profiled(shape: Shape, _seconds: float) -> Values:
    """Where a step's time goes, of the backbone and of the mixture, and how often the host waits for a GPU."""
    short = replace(shape, every=2, times=2)
    found = {name: _profile(make, short) for name, make in ((OURS, backbone), (MIXTURE, mixture))}
    text = "\n".join(f"{name}: {waits:.1f} waits of the host a step\n{table}" for name, (waits, table) in found.items())
    return {"waits_per_step": {name: waits for name, (waits, _) in found.items()}, "text": text}


def _profile(make: Callable[[Shape], Trainable], shape: Shape) -> tuple[float, str]:
    forget()
    has_gpu = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
    with profile(activities=kinds) as record:
        _ours(make, shape, False)
    averages = record.key_averages()
    waits = sum(item.count for item in averages if item.key == "cudaStreamSynchronize")
    by = "self_cuda_time_total" if has_gpu else "self_cpu_time_total"
    steps = shape.every * (shape.times + 1)
    return waits / steps, averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
