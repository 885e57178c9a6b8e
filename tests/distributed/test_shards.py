"""Weights in pieces on several ranks: the same training as in one process, and checkpoints for any number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import find_artifact, paths
from modularforge.config import Config, TrainingConfig
from modularforge.config_files import to_yaml
from modularforge.errors import ConfigError
from modularforge.pipeline import JobName, checkpoint_url, stage_url
from modularforge.run import Run
from modularforge.training.distributed import World
from modularforge.training.sharding import shard_ranks as shard_ranks_of
from tests import shard_ranks
from tests.conftest import ROOT, prepare_data, run_command, tiny_config

# Sums of gradients and norms over ranks are taken in another order; a weight moves by up to 0.01 in a step.
WEIGHT_TOLERANCE, LOSS_TOLERANCE = 5e-6, 2e-6
# In bf16 the order decides the sign of small gradients, and by that whole steps; so it does with ddp (8e-5, 0.01), and
# where sums of gradients are in bf16.
HALF_TOLERANCES = 0.05, 1e-3
FAST = ["backbone:2-fsdp", "backbone:4-hsdp", "tied:2-fsdp", "lora:2-fsdp", "mixture:4-hsdp", "half_expert:2-fsdp"]
FAST += ["sent_half:2-ddp", "patient:2-fsdp:1-ddp"]
FAST += [f"backbone:{pair}" for pair in ("2-ddp:2-fsdp", "2-fsdp:1-ddp", "2-fsdp:4-hsdp")]
FAST += ["backbone.aot_eager:2-fsdp"]
EVERY = [f"{name}:{layout}" for name in shard_ranks.NAMES for layout in ("2-fsdp", "4-hsdp")]
EVERY += [f"backbone:{pair}" for pair in ("4-hsdp:4-fsdp", "4-fsdp:2-fsdp", "4-hsdp:2-ddp")]
EVERY += ["backbone.inductor:2-fsdp", "mixture.aot_eager:4-hsdp"]
EVERY += [f"{name}.aot_eager:2-fsdp" for name in ("lora", "again", "half", "half_expert")]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name not in FAST]
EXACT = ["backbone:2-fsdp:2-fsdp", "backbone:4-hsdp:4-hsdp"]
MORE_EXACT = [
    "backbone.inductor:2-fsdp:2-fsdp",
    "backbone.aot_eager:2-fsdp:2-fsdp",
    "lora:2-fsdp:2-fsdp",
    "mixture:4-hsdp:4-hsdp",
]
SLOW_EXACT = [pytest.param(name, marks=pytest.mark.slow) for name in MORE_EXACT]
ALWAYS = ["backbone:2-fsdp", "mixture:4-hsdp"]


@pytest.fixture(scope="module")
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings that are asked for, in one process that forks their ranks."""
    folder = tmp_path_factory.mktemp("jobs")
    asked = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = {str(call.params["name"]) for call in asked if call and "name" in call.params} | {*ALWAYS}
    names |= {name.rpartition(":")[0] for name in names if name in (*EXACT, *MORE_EXACT)}
    run_command("tests.shard_ranks", str(folder), *sorted(names | {*map(alone_of, names)}))
    return folder


def alone_of(name: str) -> str:
    """The same job in one process, which is not compiled."""
    return f"{name.split(':')[0].split('.')[0]}:1-ddp"


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_pieces_train_as_one_process_does_and_go_on_in_any_layout(name: str, jobs: Path) -> None:
    alone, facts = shard_ranks.found(jobs / alone_of(name))
    weights, found = shard_ranks.found(jobs / name)
    is_half = "half" in name.split(":")[0]
    of_weights, of_losses = HALF_TOLERANCES if is_half else (WEIGHT_TOLERANCE, LOSS_TOLERANCE)
    assert difference(weights, alone) < of_weights
    assert not name.startswith("sent") or difference(weights, alone) > WEIGHT_TOLERANCE  # what was sent was rounded
    assert abs(found["train_loss"] - facts["train_loss"]) < of_losses
    assert abs(found["validation_loss"] - facts["validation_loss"]) < of_losses
    assert found.get("best_step") == facts.get("best_step") != shard_ranks.STEPS
    norms, alone_norms = (shard_ranks.norms(jobs / folder) for folder in (name, alone_of(name)))
    assert norms.shape == alone_norms.shape
    assert np.allclose(norms, alone_norms, rtol=0.2 if is_half else 1e-3, atol=1e-5, equal_nan=True)
    assert torch.allclose(found["sums"], facts["sums"], rtol=1e-4, atol=0.3 if is_half else 1e-3)


@pytest.mark.parametrize("name", [*EXACT, *SLOW_EXACT])
def test_a_job_in_pieces_goes_on_bit_for_bit_in_its_own_layout(name: str, jobs: Path) -> None:
    whole, facts = shard_ranks.found(jobs / name.rpartition(":")[0])
    resumed, found = shard_ranks.found(jobs / name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert found["train_loss"] == facts["train_loss"]


def test_a_rank_holds_its_share_alone_and_unvisited_experts_do_not_decay(jobs: Path) -> None:
    pieces = sorted((jobs / "backbone:2-fsdp/checkpoints/pieces-00000006").glob("*/state.safetensors"))
    whole = load_file(jobs / "backbone:1-ddp/checkpoints/step-00000006/state.safetensors")
    own = [load_file(piece) for piece in pieces]
    names = [name for name in whole if name.startswith(("weights.", "exp_avg"))]
    for name in names:
        assert sum(len(piece[name]) for piece in own) == len(whole[name])
    most, total = (sum(tensors[name].numel() for name in names) for tensors in (own[0], whole))
    assert most < 0.51 * total
    start = shard_ranks.job_of("mixture").model.state_dict()
    after, _ = shard_ranks.found(jobs / "mixture:4-hsdp")
    never = [name for name in start if f".experts.{shard_ranks.NEVER_VISITED}." in name]
    assert never
    assert all(torch.equal(start[name], after[name]) for name in never)


def test_weights_are_made_in_pieces_as_in_one_process_and_no_rank_holds_all(tmp_path: Path) -> None:
    """Random ones, copies and experts, one weight at a time: half of all and the largest of them, not all on each."""
    run_command("tests.shard_ranks", str(tmp_path), "deferred", env={"MALLOC_MMAP_THRESHOLD_": "65536"})
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts.pop("share") < 0.7
    assert facts == dict.fromkeys(shard_ranks.DEFERRED, 1.0)


def test_a_tensor_is_whole_on_the_rank_that_wants_it_and_the_others_hold_their_rows_alone(tmp_path: Path) -> None:
    """In bf16 and float32, with rows that the ranks do not divide; with `hsdp` one group alone has something to do."""
    run_command("tests.shard_ranks", str(tmp_path), "wholes")
    for layout, most in (("3-fsdp", 0.5), ("4-hsdp", 0.5)):
        facts, shares = json.loads((tmp_path / f"{layout}.json").read_text())
        assert facts["same"] == facts["whole"] == facts["tensors"] / int(layout[0]) > 0
        assert 1 <= shares[-1] < 1.2
        assert max(shares[:-1]) <= most


def made(folder: Path, ranks: int, kind: str, jobs: list[str], **training: Any) -> Config:
    """Stages of a tiny run of three experts, FFNs anchored, on so many ranks; its data lies beside its folder."""
    experts = {"anchored": kind == "ffn", "kind": kind, **({"unfreeze": ["attention"]} if kind == "ffn" else {})}
    # All slots are visited: where one and two ranks differ in a last bit, a token near a border would go elsewhere.
    assembly = {"router": "uniform", **({"experts_per_token": 4} if kind == "ffn" else {})}
    sections: dict[str, Any] = {"experts": experts, "training": training, "assembly": assembly}
    config = tiny_config(folder / "run", data_dir=str(folder.parent / "data"), joint={"batch_size": None}, **sections)
    folder.mkdir()
    prepare_data(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    run_command("tests.shard_ranks", str(folder / "config.yaml"), str(ranks), *jobs)
    return config


@pytest.mark.parametrize("kind", ["ffn", pytest.param("lora", marks=pytest.mark.slow)])
def test_stages_write_the_same_artifacts_from_pieces(kind: str, tmp_path: Path) -> None:
    jobs = ["backbone", "expert-0", *(["joint"] if kind == "ffn" else ["joint_lora", "branch-1"])]
    alone, pieces = made(tmp_path / "one", 1, kind, jobs), made(tmp_path / "two", 2, kind, jobs, parallel="fsdp")
    for job in map(JobName.parse, jobs):
        folders = [paths.local_path(stage_url(config, job.stage, job.index)) for config in (alone, pieces)]
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
        assert files[0] == files[1]
        for name in (path for path in files[0] if path.suffix == ".safetensors"):
            one, two = (load_file(folder / name) for folder in folders)
            tolerance = 1.0 if name.name == "statistics.safetensors" else 1e-3  # sums over 4096 tokens
            assert difference(one, two) < tolerance, name
        ours, theirs = (find_artifact(str(folder)) for folder in folders)
        assert ours is not None
        assert theirs is not None
        assert ours.manifest.fingerprint == theirs.manifest.fingerprint or job.stage != "backbone"
        losses = [artifact.manifest.facts["validation_loss"] for artifact in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_rows_of_experts_learn_in_pieces_too(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "experts": {"anchored": False, "unfreeze": ["embeddings", "head"]},
        "assembly": {"router": "evidence", "shared": "own"},
        "joint": {"batch_size": None},
    }
    found = []
    for ranks, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        folder = tmp_path / f"{ranks}-{parallel}"
        data = str(tmp_path / "data")
        config = tiny_config(folder / "run", data_dir=data, training={"parallel": parallel}, **sections)
        folder.mkdir()
        prepare_data(config)
        (folder / "config.yaml").write_text(to_yaml(config))
        run_command("tests.shard_ranks", str(folder / "config.yaml"), str(ranks), "backbone", "joint_evidence")
        made_there = paths.local_path(stage_url(config, "joint_evidence"))
        found.append({name: load_file(made_there / name) for name in ("model.safetensors", "expert_rows.tables")})
    for other in found[1:]:
        assert all(difference(found[0][name], other[name]) < 1e-3 for name in other)


def test_what_cannot_be_in_pieces_is_refused_by_name(tmp_path: Path) -> None:
    for wrong, said in (
        ({"task": "speech", "training": {"parallel": "fsdp"}}, "validation and sums of speech need the whole model"),
        ({"training": {"shard_ranks": 2}}, "training.shard_ranks must be null with training.parallel ddp"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_config(tmp_path, **wrong)
    with pytest.raises(ConfigError, match="must divide the 4 processes of the job, but is 3; choose another"):
        shard_ranks_of(TrainingConfig(parallel="hsdp", shard_ranks=3), World(0, 4))
    assert shard_ranks_of(TrainingConfig(parallel="fsdp"), World()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_a_killed_job_in_pieces_under_torchrun_goes_on_and_ends_as_one_process_does(
    parallel: str, tmp_path: Path
) -> None:
    """With `hsdp` over the processes of the node, which are all; what a kill left half written is in nobody's way."""
    data, training = str(tmp_path / "data"), {"parallel": parallel, "checkpoint_every": 5}
    config = tiny_config(tmp_path / "run", data_dir=data, backbone={"steps": 60}, training=training)
    prepare_data(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "modularforge", "backbone"]
    command += ["--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder, deadline = paths.local_path(checkpoint_url(config, "backbone")), time.monotonic() + 120
    while not list(folder.glob("step-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [int(line) for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for number in (process.pid, *workers):
        os.kill(number, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("pieces-*/*/manifest.json"))
    assert find_artifact(stage_url(config, "backbone")) is None
    run_command(*command[1:])
    alone = tiny_config(tmp_path / "alone", data_dir=data, backbone={"steps": 60})
    Run(alone).make("backbone")
    found, whole = (
        load_file(paths.local_path(stage_url(one, "backbone")) / "model.safetensors") for one in (config, alone)
    )
    assert difference(found, whole) < 2e-3
