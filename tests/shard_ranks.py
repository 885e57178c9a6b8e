"""Ranks that train together in the ways that `training.parallel` names, one after another; weights are saved behind.

`python -m tests.shard_ranks FOLDER backbone:2-fsdp backbone:2-fsdp:1-ddp`: a job in a layout, or the half of it in
one and the rest in another. `python -m tests.shard_ranks config.yaml 2 backbone expert-0`: stages of a run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.sharding import forget_peak, resident
from modularforge.config import ExpertsConfig, LoraConfig, ModelConfig, PhaseConfig, TrainingConfig
from modularforge.config_files import load_config
from modularforge.experts.ffn.training import expert_model
from modularforge.experts.lora.phases import phases_of
from modularforge.experts.lora.training import adapters
from modularforge.experts.trainable import Trainable, trainable
from modularforge.model.adapter_config import shape_of
from modularforge.model.backbone import Decoder, build_backbone, shaped_backbone
from modularforge.model.deferred import Deferred, drawn
from modularforge.model.folder import save_tensors
from modularforge.model.hub_config import backbone_config
from modularforge.model.moe import build_moe, moe_layers, restrict_routing
from modularforge.model.shards import gathered, host_tensors, in_company
from modularforge.model.upcycling import joint_mixture, widened
from modularforge.norm_files import Floats, norms_url, parse_norms
from modularforge.pipeline import JobName
from modularforge.routing.gathering import gather_statistics
from modularforge.run import Run
from modularforge.tasks.text import TEXT, TextExamples, TextValidation
from modularforge.training.distributed import World, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss, routed
from modularforge.training.sharding import shard, spread

T, V, EXPERTS, NEVER_VISITED, STEPS = 8, 31, 6, 5, 6
SHAPE = ModelConfig(width=16, layers=2, heads=2, kv_heads=2, ffn_width=24, context_length=T)
TIED = SHAPE.model_copy(update={"tied_head": True, "family": "qwen3"})
NAMES = ("backbone", "tied", "frozen", "lora", "mixture", "half", "half_expert", "again", "sent_half", "patient")
METRICS = "metrics/job.jsonl"
LARGE_V = 2048
SMALL = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, ffn_width=24, context_length=T)
LARGE = ModelConfig(width=256, layers=12, heads=4, kv_heads=4, ffn_width=1024, context_length=T)
DEFERRED = ("random", "tied", "joint", "wide", "plain", "fresh", "anchored")
IN_PIECES = TrainingConfig(parallel="fsdp")
TOKENS = np.random.default_rng(0).integers(0, V, 2000).astype(np.uint16)


def job_of(name: str) -> Trainable:
    """A backbone, one of which a part learns, adapters in phases, or a mixture with an expert that nothing visits."""
    torch.manual_seed(0)
    if name == "mixture":
        model = build_moe(SHAPE, V, EXPERTS, 2)
        for layer in moe_layers(model):
            torch.nn.init.normal_(layer.gate.weight)  # type: ignore[arg-type]
        restrict_routing(model, range(NEVER_VISITED))
        return routed(model, TEXT.loss, 1e-3)
    if name == "tied":
        return deferred(drawn(partial(shaped_backbone, TIED, V), SHAPE.layers))
    model = build_backbone(SHAPE, V)
    if name == "lora":
        lora = LoraConfig(rank=4, targets=["q_proj", "down_proj"], phases="early->late")
        model.bfloat16()  # as a pretrained backbone is stored
        return adapters(model, shape_of(lora), TEXT.loss, phases_of(lora, STEPS, SHAPE.layers), seed=0)
    if name == "half_expert":  # as on a GPU, beside a backbone that is stored in bf16
        stored = {key: weight.detach().bfloat16() for key, weight in model.named_parameters()}
        return deferred(expert_model(stored, backbone_config(SHAPE, V), ExpertsConfig(), None, True))
    if name == "frozen":
        for key, weight in model.named_parameters():
            weight.requires_grad_(".mlp." in key)
    return trainable(model, TEXT.loss)


def deferred(begun: Deferred) -> Trainable:
    """All of a model that has no weights yet, or what of it learns."""
    return trainable(begun.model, TEXT.loss, weights=begun.weights)


def begun(name: str, shape: ModelConfig) -> Deferred:
    """A model whose weights are still to be made."""
    torch.manual_seed(0)
    if name in ("random", "tied"):
        chosen = shape.model_copy(update={"tied_head": name == "tied"})
        return drawn(partial(shaped_backbone, chosen, LARGE_V), shape.layers)
    plain = build_backbone(shape, LARGE_V).bfloat16()
    stored, values = {key: weight.detach() for key, weight in plain.named_parameters()}, backbone_config(shape, LARGE_V)
    if name == "joint":
        return joint_mixture(stored, values, 3, 2, freeze_shared=False)
    if name == "wide":
        return widened(stored, values, 2)
    fresh = ExpertsConfig(anchored=name == "anchored", init="fresh" if name == "fresh" else "backbone")
    return expert_model(stored, values, fresh, [torch.ones(shape.width)] * shape.layers if fresh.anchored else None)


def make_in_pieces(folder: Path) -> None:
    """Save for each model whether its weights on two ranks are those of one process, and what the largest rank took
    while a random one was made, beside all of it.
    """

    def work() -> None:
        with joined_world(torch.device("cpu")) as world:
            facts = {}
            for name in DEFERRED:  # first, so that what is imported on the way is no part of what is measured
                whole, state = begun(name, SMALL).whole().state_dict(), torch.get_rng_state()
                looked_at = spread(begun(name, SMALL), IN_PIECES, world)
                found = {key: weight.full_tensor() for key, weight in looked_at.state_dict().items()}
                facts[name] = float(are_the_same(found, whole) and torch.equal(state, torch.get_rng_state()))
            before = resident("VmRSS")
            forget_peak(world.device)
            made = shard(deferred(begun("random", LARGE)), IN_PIECES, world)
            most = max(world.total([float(resident("VmHWM") - before) * (rank == world.rank) for rank in range(2)]))
            facts["share"] = most / sum(4 * weight.numel() for weight in made.model.parameters())
            if world.is_main:
                (folder / "facts.json").write_text(json.dumps(facts))

    together(2, work)


class Largest(TorchDispatchMode):
    """The most bytes that a tensor had which something made, wherever they came from."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((made, args)):
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return made


def gather_wholes(folder: Path) -> None:
    """Save of each layout whether tensors are whole on the rank that wants them alone, and the most bytes that a rank
    had in one tensor meanwhile, beside those of all of that tensor.
    """

    def work(layout: str) -> None:
        with joined_world(torch.device("cpu")) as world:
            settings = TrainingConfig(parallel="hsdp", shard_ranks=2) if layout == "4-hsdp" else IN_PIECES
            model = shard(job_of("half_expert"), settings, world).model  # of two types
            wanted_by = world.size - 1
            facts = {"same": 0.0, "tensors": 0.0, "whole": 0.0}
            shares = [0.0] * world.size
            for weight in model.parameters():
                everything = weight.full_tensor()  # type: ignore[attr-defined]
                with Largest() as largest:
                    found = gathered(weight, wanted_by)
                facts["tensors"] += 1
                facts["whole"] += found is not None
                facts["same"] += found is not None and torch.equal(found, everything) and found.dtype == weight.dtype
                share = largest.most / everything.untyped_storage().nbytes()
                shares[world.rank] = max(shares[world.rank], share)
            keys = list(facts)
            facts = dict(zip(keys, world.total([facts[key] for key in keys]), strict=True))
            others = world.total(shares)
            if world.is_main:
                (folder / f"{layout}.json").write_text(json.dumps([facts, others]))

    for layout in ("3-fsdp", "4-hsdp"):
        together(int(layout[0]), partial(work, layout))


def are_the_same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    """Whether tensors are the same, with their types."""
    same = [torch.equal(found[name], whole[name]) and found[name].dtype == whole[name].dtype for name in whole]
    return found.keys() == whole.keys() and all(same)


def train(name: str, parallel: str, folder: Path, world: World, until: int = STEPS, **training: Any) -> None:
    """Train or go on up to a step, then write weights, losses and sums to `folder`, from rank 0.

    `mixture.aot_eager` is the job `mixture`, compiled by that backend.
    """
    name, _, backend = name.partition(".")
    if backend:
        torch.compile = partial(torch.compile, backend=backend)
    phase = PhaseConfig(steps=STEPS, batch_size=8, accumulation_steps=2, warmup_steps=1, peak_learning_rate=1e-2)
    given: dict[str, Any] = {"precision": "bf16" if name.startswith("half") else "fp32"}
    given |= {"recompute": "blocks" if name == "again" else "none"}
    given |= {"gradient_exchange": "bf16" if name == "sent_half" else "fp32"}
    given |= {"patience": 9, "validate_every": 1} if name == "patient" else {}
    given |= {"parallel": parallel, "log_every": 1, "checkpoint_every": 2, "gradient_norms": 2}
    given |= {"compile": bool(backend)}
    settings = TrainingConfig(**{**given, **training})
    places = str(folder / "checkpoints"), str(folder / METRICS)
    job = Job(name, phase, settings, "f", *places, tokens=64, until=until)
    learns, examples = job_of(name), TextExamples(TOKENS, T, 8, 3, sample_windows=8, sample_batch=2)
    held_out = TextValidation(TOKENS[:200], T, 4)  # seven batches, which ranks share unevenly
    losses = fit(learns, examples, job, partial(mean_loss, learns.model, held_out, world), world)
    save(learns, losses, examples, folder, world)


def save(learns: Trainable, losses: dict[str, Any], examples: TextExamples, folder: Path, world: World) -> None:
    """What the test compares."""
    model = learns.model
    assert isinstance(model, Decoder)
    with in_company(model, world.total):
        if world.is_main:
            sums = gather_statistics(model, examples.sample(), world.device)
            save_tensors(host_tensors(model.state_dict()), folder / "weights.safetensors")
            means = torch.stack([torch.from_numpy(layer.sum_D) for layer in sums.layers])
            found: dict[str, Any] = {
                name: losses[name] for name in ("train_loss", "validation_loss", "best_step") if name in losses
            }
            torch.save({**found, "sums": means}, folder / "found.pt")


def found(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was saved."""
    return load_file(folder / "weights.safetensors"), torch.load(folder / "found.pt", weights_only=True)


def norms(folder: Path) -> Floats:
    """The gradients' norms that were measured, by step and group."""
    return parse_norms(Path(norms_url(str(folder / METRICS))).read_bytes()).groups_SG


def together(size: int, work: Callable[[], object]) -> None:
    """Run `work` in forked processes that are each other's ranks, without torchrun, which takes seconds to start."""
    for needed in ("torch._dynamo", "torch.distributed.fsdp"):  # else each rank imports them, which takes a second too
        import_module(needed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, sizes, work)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert not any(process.exitcode for process in ranks), [process.exitcode for process in ranks]


def _rank(rank: int, sizes: dict[str, int], work: Callable[[], object]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, **sizes, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in names.items()})
    work()


def run_layout(folder: Path, name: str, layout: str, until: int = STEPS) -> None:
    """Train in a layout, such as `2-fsdp`."""
    size, parallel = layout.split("-")
    given = {"shard_ranks": 2} if parallel == "hsdp" else {}
    folder.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        with joined_world(torch.device("cpu")) as world:
            train(name, parallel, folder, world, until, **given)

    together(int(size), work)


def make(path: str, size: int, jobs: list[str]) -> None:
    """Make stages of a run, one after another, each on `size` ranks."""
    config = load_config(path)
    for job in map(JobName.parse, jobs):
        together(size, partial(Run(config).make, job.stage, job.index))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1].endswith(".yaml"):
        make(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
        sys.exit()
    if sys.argv[2:] == ["deferred"]:
        make_in_pieces(Path(sys.argv[1]))
        sys.exit()
    if sys.argv[2:] == ["wholes"]:
        gather_wholes(Path(sys.argv[1]))
        sys.exit()
    for wanted in sys.argv[2:]:
        kind, *layouts = wanted.split(":")
        for number, layout in enumerate(layouts):
            is_last = number == len(layouts) - 1
            run_layout(Path(sys.argv[1]) / wanted, kind, layout, STEPS if is_last else STEPS // 2)
