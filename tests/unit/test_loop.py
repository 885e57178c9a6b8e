"""The training loop's parts: schedule, optimizer groups, stop flag, metrics."""

from __future__ import annotations

import functools
import itertools
import json
import math
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from checkpoints import CorruptArtifactError
from modularforge import log as log_module
from modularforge.config import PhaseConfig, TrainingConfig
from modularforge.errors import Interrupted, StoreError, TrainingError
from modularforge.experts.trainable import ParameterGroup, Tensors, Trainable, trainable
from modularforge.log import MetricsLog, json_safe
from modularforge.pipeline import stage_settings
from modularforge.tasks.task import Batch
from modularforge.training.checkpointing import Checkpointing
from modularforge.training.distributed import World
from modularforge.training.job import Job
from modularforge.training.loop import _pieces, fit
from modularforge.training.optimizer import AdamW, bare, build_optimizer, learning_rate
from tests.conftest import tiny_config


@dataclass(frozen=True)
class Lines:
    """Examples of y = 2x; one batch is `nan` if asked for."""

    rows: int = 8
    nan_at: int = -1

    def batches(self, position: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        while True:
            x = torch.randn(self.rows, 1, generator=torch.Generator().manual_seed(position))
            x = x * math.nan if position == self.nan_at else x
            position += 1
            yield Batch({"x": x, "y": 2 * x}, position, self.rows)


def squared_error(model: nn.Module, tensors: Tensors) -> Tensor:
    return (model(tensors["x"]) - tensors["y"]).square().mean()


def test_only_what_torch_is_known_to_wrap_around_its_methods_is_left_out() -> None:
    """Torch's own, the hook that it adds when an optimizer is first made, and those that somebody else has made."""
    weight = nn.Parameter(torch.ones(2))
    torch.optim.AdamW([weight])
    hooked: Any = torch.optim.AdamW.step
    assert hooked.hooked
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad, hooked):
        found = bare(method)
        assert not hasattr(found, "__wrapped__")
        assert found.__code__.co_name in ("add_param_group", "zero_grad", "step")

    def step(self: torch.optim.Optimizer) -> None:
        self.zero_grad()

    @functools.wraps(hooked)
    def counted(*arguments: Any) -> Any:
        return hooked(*arguments)

    assert bare(counted) is counted  # what it does besides is not lost
    assert bare(step) is step
    assert bare(functools.partial(step)) is not step


def test_adamw_does_the_same_step_where_torchs_methods_stay_as_they_are() -> None:
    class Kept(torch.optim.AdamW):
        step = torch.no_grad()(torch.optim.AdamW.step)

    found = []
    for kind in (AdamW, Kept, torch.optim.AdamW):
        weight = nn.Parameter(torch.arange(4.0))
        optimizer = kind([{"params": [weight], "weight_decay": 0.1}], lr=0.1, fused=True)
        for _ in range(3):
            weight.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert weight.grad is None
        found.append(weight.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


PHASE = PhaseConfig(steps=100, warmup_steps=10, peak_learning_rate=1.0, final_learning_rate_ratio=0.1)


def test_the_rate_warms_up_linearly_peaks_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(PHASE, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert learning_rate(PHASE, 100) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 3), "linear": nn.Linear(3, 2)})
    groups = trainable(model, squared_error).groups
    optimizer = build_optimizer(groups, PHASE.model_copy(update={"weight_decay": 0.5}), TrainingConfig())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model["linear"].weight)] == 0.5
    assert decays[id(model["linear"].bias)] == 0
    assert decays[id(model["embed_tokens"].weight)] == 0


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(trainable(model, squared_error).groups, PHASE, TrainingConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def train_a_line(tmp_path: Path, training: TrainingConfig, steps: int = 40, rate: float = 0.1) -> list[dict[str, Any]]:
    """Fit y = 2x by the loop; returns the metrics lines."""
    torch.manual_seed(0)
    model, url = nn.Linear(1, 1), str(tmp_path / "metrics.jsonl")
    phase = PhaseConfig(steps=steps, batch_size=8, peak_learning_rate=0.1, warmup_steps=1)

    job = Job("line", phase, training, "fingerprint", str(tmp_path / "checkpoints"), url)
    fit(trainable(model, squared_error), Lines(), job, lambda: float(model.weight - 2) ** 2, World())
    return [json.loads(line) for line in Path(url).read_text().splitlines()]


def test_training_writes_metrics_with_every_promised_field(tmp_path: Path) -> None:
    training = TrainingConfig(log_every=10, validate_every=20, checkpoint_every=1000)
    rows = train_a_line(tmp_path, training)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [10, 20, 30, 40]
    fields = {"job", "time", "tokens", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "data_wait_share"}
    assert all(fields | {"peak_memory_bytes"} <= row.keys() for row in steps)
    assert steps[-1]["tokens"] == 40 * 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["step"] for row in rows if "validation_loss" in row] == [20, 40]


def test_checkpoints_are_kept_as_many_as_wished(tmp_path: Path) -> None:
    train_a_line(tmp_path, TrainingConfig(log_every=10, checkpoint_every=10, keep_checkpoints=2, validate_every=50))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000030", "step-00000040"]
    some = TrainingConfig(checkpoint_every=10, keep_checkpoints=1, keep_checkpoints_every=20)
    train_a_line(tmp_path / "some", some, steps=50)
    names = sorted(path.name for path in (tmp_path / "some" / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000040", "step-00000050"]


def test_a_job_goes_on_from_an_older_checkpoint_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = TrainingConfig(log_every=10, checkpoint_every=10)
    rows = train_a_line(tmp_path, training)
    newest = tmp_path / "checkpoints" / "step-00000040" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptArtifactError, match=r"1 there.* --set training\.checkpoint_fallback=true"):
        train_a_line(tmp_path, training)
    again = train_a_line(tmp_path, training.model_copy(update={"checkpoint_fallback": True}))
    assert "FALLBACK: training goes on from step 30" in caplog.text
    assert [row.get("loss") for row in again] == [row.get("loss") for row in rows], "step 31 to 40 were made again"


def train_with_patience(
    folder: Path, losses: list[float], stop_after: int = 0, patience: int = 2
) -> tuple[float, dict[str, float | None], dict[int, float]]:
    """Validate every second step, with these losses in turn; returns the weight, what `fit` says, weights by step."""
    torch.manual_seed(0)
    model, seen = nn.Linear(1, 1), dict[int, float]()
    training = TrainingConfig(validate_every=2, checkpoint_every=3, log_every=1, patience=patience)
    job = Job("line", PhaseConfig(steps=12, batch_size=8, warmup_steps=1), training, "x", str(folder / "checkpoints"))
    found = trainable(model, squared_error)
    steps: list[int] = []
    found = replace(found, before_step=steps.append)

    def validate() -> float:
        seen[steps[-1] + 1] = float(model.weight)
        return losses[(steps[-1] + 1) // 2 - 1]

    stops = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patched:
        if stop_after:
            patched.setattr(Checkpointing, "agree_to_stop", lambda *_: next(stops) == stop_after)
            with pytest.raises(Interrupted):
                fit(found, Lines(), job, validate, World())
            return train_with_patience(folder, losses)
        ended = fit(found, Lines(), job, validate, World())
    del ended["processor_seconds"]  # a measured time
    return float(model.weight), ended, seen


def test_a_job_without_better_validations_ends_with_the_weights_of_the_best(tmp_path: Path) -> None:
    losses = [3.0, 1.0, 1.5, 2.0, 0.1, 0.1]
    weight, ended, seen = train_with_patience(tmp_path / "a", losses)
    assert (ended["steps"], ended["best_step"], ended["validation_loss"]) == (8, 4, 1.0)
    assert weight == seen[4] != seen[8]
    for stop_after in (3, 5, 7, 8):
        again, after, _ = train_with_patience(tmp_path / f"stopped-{stop_after}", losses, stop_after)
        assert (again, after) == (weight, ended), stop_after
    weight, ended, seen = train_with_patience(tmp_path / "b", [3.0, 1.0, 1.5, 0.5, 0.6, 0.7], patience=9)
    assert (ended["steps"], ended["best_step"]) == (12, 8)
    assert weight == seen[8] != seen[12]


@dataclass(frozen=True)
class TwoRanks(World):
    """Two ranks of which the other one never wants anything; `seconds` is what a step of both takes."""

    size: int = 2
    seconds: float = 0.0
    exchanges: list[list[float]] = field(default_factory=list)

    def total(self, values: list[float]) -> list[float]:
        self.exchanges.append(values)
        return [*values[:3], 2 * self.seconds]


@pytest.mark.parametrize(("seconds", "calls", "late"), [(0.0, 3, 7), (0.3, 6, 2), (1.0, 17, 0), (60.0, 17, 0)])
def test_ranks_speak_of_a_stop_once_a_second_and_never_later_than_in_eight_steps(
    seconds: float, calls: int, late: int
) -> None:
    world = TwoRanks(seconds=seconds)
    checkpoints = Checkpointing(Job("job", PHASE, TrainingConfig()), world)
    assert not any(checkpoints.agree_to_stop(False) for _ in range(17))
    assert len(world.exchanges) == calls
    waited = 0
    while not checkpoints.agree_to_stop(True):
        waited += 1
    assert waited <= late
    alone = Checkpointing(Job("job", PHASE, TrainingConfig()), World())
    assert [alone.agree_to_stop(wants) for wants in (False, True)] == [False, True]


def test_patience_counts_with_what_it_judges_by_where_it_is_set(tmp_path: Path) -> None:
    def settings(stage: str, **training: Any) -> dict[str, Any]:
        return stage_settings(tiny_config(tmp_path, training=training), stage)

    for stage in ("backbone", "expert", "dense", "joint"):
        assert settings(stage, validate_every=7) == settings(stage, patience=None)
        assert settings(stage, patience=2)["training.validate_every"] != 7
        assert settings(stage, patience=2) != settings(stage, patience=2, validate_every=7) != settings(stage)
    assert settings("calibrate", patience=2, validate_every=7) == settings("calibrate")


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    training = TrainingConfig(log_every=1000, checkpoint_every=20, validate_every=1000)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    job = Job("line", PHASE, training, "fingerprint", str(tmp_path / "checkpoints"))

    with pytest.raises(TrainingError, match="at or before step 40"):
        fit(trainable(model, squared_error), Lines(nan_at=25), job, lambda: 0.0, World())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


def test_metrics_after_the_checkpoint_are_dropped_on_restart_and_torn_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path))
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    again = MetricsLog(str(path))
    again.restart_after(2)
    again.write(step=3, loss=float("inf"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] == "inf"


def test_a_second_process_cannot_write_the_same_jobs_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LOCK_SECONDS", 0.0)
    path = tmp_path / "metrics" / "backbone.jsonl"
    code = (
        f"import sys; from modularforge.log import MetricsLog; MetricsLog({str(path)!r}).restart_after(0); print(1); "
    )
    code += "sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(StoreError, match=r"backbone\.jsonl must have one writer, but another process is training"):
            MetricsLog(str(path)).restart_after(0)
        MetricsLog(str(tmp_path / "metrics" / "expert-0.jsonl")).restart_after(0)
        process.kill()
    MetricsLog(str(path)).restart_after(0)
    MetricsLog(str(path)).restart_after(0)  # the same process may, after an interruption


def test_a_job_waits_for_the_end_of_its_killed_predecessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.jsonl"
    code = (
        f"from modularforge.log import MetricsLog; MetricsLog({str(path)!r}).restart_after(0); print(1, flush=True); "
    )
    with subprocess.Popen(
        [sys.executable, "-c", code + "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"1\n"
        waits: list[float] = []

        def end_the_other(seconds: float) -> None:
            waits.append(seconds)
            process.kill()
            process.wait()

        monkeypatch.setattr("modularforge.log.time.sleep", end_the_other)
        MetricsLog(str(path)).restart_after(0)
        assert waits == [log_module.POLL_SECONDS]


def test_a_job_that_ended_gives_its_metrics_free(tmp_path: Path) -> None:
    path = tmp_path / "backbone.jsonl"
    code = f"from modularforge import log; log.LOCK_SECONDS = 0; log.MetricsLog({str(path)!r}).restart_after(0)"
    log = MetricsLog(str(path))
    log.restart_after(0)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
    log.close()
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def test_metrics_on_an_object_store_appear_at_a_flush() -> None:
    from checkpoints import paths

    log = MetricsLog("memory://metrics-test/a.jsonl")
    log.restart_after(0)
    log.write(step=1)
    log.flush()
    log.write(step=2)
    log.flush()
    assert len(paths.read_bytes(log.url).splitlines()) == 2


def test_json_can_hold_every_number() -> None:
    values = {"a": [math.inf, -math.inf, math.nan, 1.5], "b": (1, {"c": math.inf})}
    assert json.loads(json.dumps(json_safe(values), allow_nan=False)) == {
        "a": ["inf", "-inf", "nan", 1.5],
        "b": [1, {"c": "inf"}],
    }


@pytest.mark.parametrize(("share", "count"), [(2, 4), (3, 2)])
def test_a_share_that_cannot_be_cut_into_equal_pieces_is_refused(share: int, count: int) -> None:
    """Fewer pieces than expected would never let ranks exchange their gradients."""
    assert len(list(_pieces({"inputs": torch.zeros(4, 5), "targets": torch.zeros(4, 5)}, 2))) == 2
    with pytest.raises(TrainingError, match=f"must divide the {share} sequences .* but is {count}"):
        _pieces({"inputs": torch.zeros(share, 5)}, count)


def test_a_stopped_job_lets_go_of_its_wrapped_model_before_it_leaves_the_world(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The exception that is on its way holds the loop's frame: with DDP in it, ranks of gloo hang at their end."""
    made: list[weakref.ref[nn.Module]] = []

    def parallelised(model: nn.Module, *_: object) -> nn.Module:
        wrapped = nn.Sequential(model)
        made.append(weakref.ref(wrapped))
        return wrapped

    def stopped(model: nn.Module, tensors: Tensors) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return squared_error(model, tensors)

    monkeypatch.setattr("modularforge.training.loop.parallelise", parallelised)
    job = Job("line", PHASE, TrainingConfig(), "fingerprint", str(tmp_path / "checkpoints"))
    with pytest.raises(Interrupted) as stop:
        fit(trainable(nn.Linear(1, 1), stopped), Lines(), job, lambda: 0.0, World())
    assert stop.tb is not None
    assert [wrapped() for wrapped in made] == [None]


def test_gradients_of_a_group_with_a_limit_are_scaled_down_to_it_before_the_step() -> None:
    model = nn.ModuleDict({"own": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    groups = [
        ParameterGroup({f"{name}.{key}": weight for key, weight in part.named_parameters()}, clip_norm=limit)
        for (name, part), limit in zip(model.items(), (0.001, None), strict=True)
    ]

    def loss(_model: nn.Module, tensors: Tensors) -> Tensor:
        found: Tensor = sum((part(tensors["x"]) - 9 * tensors["y"]).square().mean() for part in model.values())
        return found

    norms: list[list[float]] = []

    def see(*_: object) -> None:
        found = [
            torch.stack([w.grad.norm() for w in g.parameters.values() if w.grad is not None]).norm() for g in groups
        ]
        norms.append([float(norm) for norm in found])

    hook = register_optimizer_step_pre_hook(see)
    try:
        phase = PHASE.model_copy(update={"steps": 3})
        job = Job("clipped", phase, TrainingConfig(clip_norm=100.0, log_every=1))
        fit(Trainable(model, loss, groups), Lines(), job, lambda: 0.0, World())
    finally:
        hook.remove()
    assert len(norms) == 3
    for own, other in norms:
        assert own == pytest.approx(0.001, rel=1e-3)
        assert other > 1
