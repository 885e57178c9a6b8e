"""Ranks that train together in one of the ways that `training.parallel` names; whole weights are saved behind it.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.shard_ranks FOLDER NAME PARALLEL [STEPS] [LAST]
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from modularforge.config import ModelConfig, PhaseConfig, TrainingConfig
from modularforge.experts.lora.phases import phases_of, stretched
from modularforge.experts.lora.training import adapters
from modularforge.experts.trainable import Trainable, trainable
from modularforge.model.adapter_config import AdapterShape
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.model.folder import save_tensors
from modularforge.model.moe import build_moe, moe_layers, restrict_routing
from modularforge.model.shards import host_tensors, in_company
from modularforge.routing.gathering import gather_statistics
from modularforge.tasks.text import TEXT, TextExamples, TextValidation
from modularforge.training.distributed import World, joined_world
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.losses import mean_loss, routed

T, V, EXPERTS, NEVER_VISITED, STEPS = 8, 31, 6, 5, 6
SHAPE = ModelConfig(width=16, layers=2, heads=2, kv_heads=2, ffn_width=24, context_length=T)
TIED = SHAPE.model_copy(update={"tied_head": True, "family": "qwen3"})
NAMES = ("backbone", "tied", "frozen", "lora", "mixture")
TOKENS = np.random.default_rng(0).integers(0, V, 2000).astype(np.uint16)


def job_of(name: str) -> Trainable:
    """A backbone, one of which a part alone learns, adapters in phases, or a mixture one expert of which none visits."""
    torch.manual_seed(0)
    if name == "mixture":
        model = build_moe(SHAPE, V, EXPERTS, 2)
        for layer in moe_layers(model):
            torch.nn.init.normal_(layer.gate.weight)  # type: ignore[arg-type]
        restrict_routing(model, range(NEVER_VISITED))
        return routed(model, TEXT.loss, 1e-3)
    model = build_backbone(TIED if name == "tied" else SHAPE, V)
    if name == "lora":
        lora = AdapterShape(("q_proj", "down_proj"), 4, 8.0, 0.0, False)
        raise NotImplementedError(lora, phases_of, stretched, adapters)
    if name == "frozen":
        for key, weight in model.named_parameters():
            weight.requires_grad_(".mlp." in key)
    return trainable(model, TEXT.loss)


def train(name: str, parallel: str, folder: Path, world: World, steps: int = STEPS, **training: Any) -> None:
    """Train, then write weights, losses and sums to `folder`, from rank 0."""
    phase = PhaseConfig(steps=STEPS, batch_size=8, accumulation_steps=2, warmup_steps=1, peak_learning_rate=1e-2)
    settings = TrainingConfig(parallel=parallel, log_every=1, checkpoint_every=2, **training)
    url = str(folder / "checkpoints") if steps != STEPS or (folder / "checkpoints").exists() else None
    job = Job(name, phase, settings, "f", url, tokens=64, until=steps)
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
            found = {name: losses[name] for name in ("train_loss", "validation_loss")}
            torch.save({**found, "sums": means}, folder / "found.pt")


def found(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was saved."""
    return load_file(folder / "weights.safetensors"), torch.load(folder / "found.pt", weights_only=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, name, parallel = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    given = {"shard_ranks": 2} if parallel == "hsdp" else {}
    with joined_world(torch.device("cpu")) as joined:
        train(name, parallel, folder, joined, int(os.environ.get("STEPS", STEPS)), **given)
