"""Jobs whose parts are switched by step: they resume in every phase, each group at its own rate and decay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints.training import Checkpoint, load_newest_checkpoint, save_checkpoint
from modularforge.config import PhaseConfig, TrainingConfig
from modularforge.errors import MismatchError
from modularforge.experts.trainable import trainable
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import fit
from modularforge.training.optimizer import Trainer, build_optimizer, learning_rate, set_rate
from tests import phases
from tests.conftest import ROOT
from tests.unit.test_loop import Lines, squared_error

TIMES = ("time", "seconds_per_second", "data_wait_share", "peak_memory_bytes")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint holds."""
    found = load_newest_checkpoint(str(folder / "checkpoints"), "f")
    assert found is not None
    assert found.step == phases.STEPS
    return found.tensors


def lines_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    phases.train(folder, World())
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    found, expected = state_of(folder), state_of(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert lines_of(folder) == lines_of(whole)


@pytest.mark.parametrize("step", [5, phases.ADAPTER_FROM + 3, phases.BOTH_FROM + 3])
def test_a_job_killed_in_any_of_its_phases_resumes_bit_for_bit(step: int, tmp_path: Path, uninterrupted: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.phases", str(tmp_path), str(step)], cwd=ROOT, check=False)
    assert done.returncode == -9
    newest = load_newest_checkpoint(str(tmp_path / "checkpoints"), "f")
    assert newest is not None
    phases.SEEN.clear()
    phases.train(tmp_path, World())
    assert phases.SEEN[0] == newest.step > 0, "it goes on, and does not start over"
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("step", [phases.ADAPTER_FROM, phases.BOTH_FROM])
def test_a_job_whose_checkpoint_lies_between_two_phases_resumes_bit_for_bit(
    step: int, tmp_path: Path, uninterrupted: Path
) -> None:
    found = Path(uninterrupted / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / found.name).symlink_to(found)
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:step]))
    phases.SEEN.clear()
    phases.train(tmp_path, World())
    assert phases.SEEN[0] == step
    assert_same(tmp_path, uninterrupted)


def test_what_is_frozen_stays_and_has_no_moments(uninterrupted: Path) -> None:
    fresh = phases.trainable().parameters
    for step in (2, phases.ADAPTER_FROM):
        early = torch_state(uninterrupted, step)
        assert torch.equal(early["weights.adapter.weight"], fresh["adapter.weight"])
        assert not any(name.endswith("adapter.weight") and not name.startswith("weights.") for name in early)
    first, second = (torch_state(uninterrupted, step) for step in (phases.ADAPTER_FROM, phases.BOTH_FROM))
    assert torch.equal(first["weights.projector.weight"], second["weights.projector.weight"])
    assert torch.equal(first["exp_avg.projector.weight"], second["exp_avg.projector.weight"])
    assert not torch.equal(first["weights.adapter.weight"], second["weights.adapter.weight"])


def torch_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def test_groups_have_rates_and_decays_of_their_own() -> None:
    learns = phases.trainable()
    optimizer = build_optimizer(learns.groups, PhaseConfig(weight_decay=0.1), TrainingConfig())
    set_rate(optimizer, 0.2)
    by_shape = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert by_shape == [(0.2, 0.1), (0.2, 0.0), (0.1, 0.0)], "projector matrix, its bias, adapter"


def test_units_and_observations_go_to_the_metrics(uninterrupted: Path) -> None:
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["seconds"] == 4
    assert rows[3]["seconds_per_second"] > 0
    assert rows[0]["adapter_norm"] == rows[phases.ADAPTER_FROM - 1]["adapter_norm"]
    assert rows[phases.ADAPTER_FROM]["adapter_norm"] != rows[0]["adapter_norm"]
    assert "tokens" not in rows[0]


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Written out by hand: names of trained weights, AdamW's moments under them, the random state."""
    phase = PhaseConfig(steps=8, batch_size=8, peak_learning_rate=0.1, warmup_steps=1)
    training = TrainingConfig(checkpoint_every=100)

    def model_of() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
        model[0].requires_grad_(False)
        return model

    old, stream = model_of(), Lines().batches()
    trained = [weight for weight in old.parameters() if weight.requires_grad]
    groups = [{"params": trained[:1], "weight_decay": 0.0}, {"params": trained[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step)
        squared_error(old, next(stream).tensors).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    names = {name: weight for name, weight in old.named_parameters() if weight.requires_grad}
    tensors = {f"weights.{name}": weight.detach() for name, weight in names.items()}
    tensors |= {f"{key}.{name}": value for name, w in names.items() for key, value in optimizer.state[w].items()}
    state = {"position": 5, "train_loss": 1.0, "validation_loss": None}
    url = str(tmp_path / "checkpoints")
    save_checkpoint(url, Checkpoint(5, {**tensors, "random_state": torch.get_rng_state()}, state), "f", 2)

    resumed, whole = model_of(), model_of()
    fit(trainable(resumed, squared_error), Lines(), Job("old", phase, training, "f", url), lambda: 0.0, World())
    fit(trainable(whole, squared_error), Lines(), Job("new", phase, training), lambda: 0.0, World())
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_checkpoint_of_other_parameters_is_refused() -> None:
    learns = phases.trainable()
    trainer = Trainer(learns, build_optimizer(learns.groups, PhaseConfig(), TrainingConfig()))
    tensors = trainer.tensors()
    del tensors["weights.adapter.weight"]
    with pytest.raises(
        MismatchError, match=r"but adapter\.weight \(1 differ\) is missing; delete the job's checkpoints"
    ):
        trainer.restore(tensors)
