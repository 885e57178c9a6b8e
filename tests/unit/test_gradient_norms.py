"""Norms of gradients by group and layer are those of plain autograd, and rows never shift or come twice."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modularforge.errors import Interrupted
from modularforge.model.names import module_group
from modularforge.norm_files import GROUPS, IN_LAYERS, norms_line, parse_norms
from modularforge.tasks.text import TEXT
from modularforge.training.checkpointing import Checkpointing
from modularforge.training.gradient_norms import NormMeasure
from modularforge.training.optimizer import learning_rate
from tests import norms
from tests.conftest import run_command

PAUSED = norms.ATTENTION_FROM


def folder_of(run: Path) -> Path:
    return run / "metrics" / "gradients" / "job"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder_of(run) / "norms.jsonl").read_text().splitlines()]


def by_autograd() -> dict[int, dict[str, Any]]:
    """Norms at the measured steps, written out: whole batches, one loss, one sum of squares after another."""
    trainable = norms.trainable()
    model, learns = trainable.model, trainable.parameters
    phase = norms.job_of(Path()).phase
    decayed, plain = ([w for w in learns.values() if (w.dim() == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": phase.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    found: dict[int, dict[str, Any]] = {}
    for step in range(norms.STEPS):
        trainable.before_step(step)
        ids_BT = norms.batch_of(step)
        TEXT.loss(model, {"inputs": ids_BT[:, :-1], "targets": ids_BT[:, 1:]}).backward()
        if (step + 1) % norms.EVERY == 0:
            found[step + 1] = {name: float(w.grad.norm()) for name, w in learns.items() if w.grad is not None}
        nn.utils.clip_grad_norm_(learns.values(), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def together(found: dict[str, float], *parts: str) -> float:
    return math.sqrt(sum(norm**2 for name, norm in found.items() if all(part in name for part in parts)))


@pytest.fixture(scope="module")
def expected() -> dict[int, dict[str, Any]]:
    return by_autograd()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    norms.train(folder)
    return folder


def assert_measured(run: Path, expected: dict[int, dict[str, Any]], tolerance: float = 1e-5) -> None:
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(expected)
    for row in rows:
        found = expected[row["step"]]
        for group, part in (("attention", "self_attn"), ("mlp", ".mlp."), ("head", "lm_head"), ("other", "norm")):
            assert row[group] == pytest.approx(together(found, part), rel=tolerance), group
        assert row["total"] == pytest.approx(together(found, ""), rel=tolerance)
        for layer in range(norms.LAYERS):
            for group, part in (("attention", "self_attn"), ("mlp", ".mlp."), ("other", "norm"), ("total", "")):
                own = row["layers"][group][layer]
                if (group, layer) != ("mlp", 0):
                    assert own == pytest.approx(together(found, f"layers.{layer}.", part), rel=tolerance), group


def test_norms_are_those_of_plain_autograd_before_clipping(whole: Path, expected: dict[int, dict[str, Any]]) -> None:
    assert_measured(whole, expected)
    clipped = [json.loads(line) for line in (whole / "metrics" / "job.jsonl").read_text().splitlines()]
    totals = {row["step"]: row["total"] for row in rows_of(whole)}
    both = [(row["gradient_norm"], totals[row["step"]]) for row in clipped if row["step"] in totals and "loss" in row]
    assert len(both) == norms.STEPS // norms.EVERY
    assert all(total == pytest.approx(norm, rel=1e-5) for norm, total in both)


def test_pieces_of_an_accumulated_batch_are_measured_together(
    tmp_path: Path, expected: dict[int, dict[str, Any]]
) -> None:
    norms.train(tmp_path, accumulation=2)
    assert_measured(tmp_path, expected, tolerance=2e-4)


def test_two_ranks_measure_the_gradient_of_the_whole_batch_once(
    tmp_path: Path, expected: dict[int, dict[str, Any]]
) -> None:
    run_command("tests.norms", str(tmp_path))
    assert_measured(tmp_path, expected, tolerance=2e-4)


def test_what_is_paused_is_zero_and_what_is_not_trained_is_no_number(whole: Path) -> None:
    for row in rows_of(whole):
        assert row["embedding"] == "nan", "no parameter of it is trained"
        assert row["layers"]["mlp"][0] == "nan"
        is_paused = row["step"] <= PAUSED
        assert (row["attention"] == 0) == is_paused
        assert [norm == 0 for norm in row["layers"]["attention"]] == [is_paused] * norms.LAYERS
        assert set(row["layers"]) == set(IN_LAYERS)
        assert {len(layers) for layers in row["layers"].values()} == {norms.LAYERS}


def test_tables_and_summary_say_what_the_lines_say(whole: Path) -> None:
    rows, folder = rows_of(whole), folder_of(whole)
    table = list(csv.DictReader((folder / "group_norms.csv").open()))
    assert [int(row["step"]) for row in table] == [row["step"] for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert [float(line[group]) for group in GROUPS] == pytest.approx(
            [float(row[group]) for group in GROUPS], nan_ok=True
        )
    assert [line["attention_to_mlp"] for line in table[:2]] == ["nan", "nan"], "attention is paused"
    last = rows[-1]["attention"] / rows[-1]["mlp"]
    assert float(table[-1]["attention_to_mlp"]) == pytest.approx(last, rel=1e-6)
    layers = list(csv.DictReader((folder / "layer_norms.csv").open()))
    assert [(int(row["step"]), int(row["layer"])) for row in layers] == [
        (row["step"], layer) for row in rows for layer in range(norms.LAYERS)
    ]
    assert [float(row["mlp"]) for row in layers[-2:]] == pytest.approx(rows[-1]["layers"]["mlp"][1:])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["measurements"] == 4
    assert summary["groups"]["embedding"] is None
    assert summary["groups"]["attention"]["measurements"] == 2
    assert summary["groups"]["mlp"]["mean"] == pytest.approx(np.mean([row["mlp"] for row in rows]))
    assert summary["layers"]["mlp"][0] == "nan"


def test_an_interrupted_job_writes_no_line_twice(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at step 5, whose lines and those before are kept; a line from beyond, as a kill leaves it, goes."""
    stops = iter([False] * 4 + [True])
    with monkeypatch.context() as stopped:
        stopped.setattr(Checkpointing, "agree_to_stop", lambda _self, _wants: next(stops))
        with pytest.raises(Interrupted):
            norms.train(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4]
    with (folder_of(tmp_path) / "norms.jsonl").open("a") as file:
        file.write(json.dumps({**rows_of(tmp_path)[0], "step": 6}) + '\n{"step": 7, "to')
    norms.train(tmp_path)

    def without_times(run: Path) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "time"} for row in rows_of(run)]

    assert without_times(tmp_path) == without_times(whole)
    for name in ("group_norms.csv", "layer_norms.csv", "summary.json"):
        assert (folder_of(tmp_path) / name).read_bytes() == (folder_of(whole) / name).read_bytes()


@pytest.mark.parametrize("off", [0, None])
def test_nothing_is_measured_unless_asked_for_and_nothing_else_changes(
    off: int | None, tmp_path: Path, whole: Path
) -> None:
    norms.train(tmp_path, gradient_norms=off)
    assert not folder_of(tmp_path).exists()
    found, measured = (
        (run / "checkpoints" / "step-00000008" / "state.safetensors").read_bytes() for run in (tmp_path, whole)
    )
    assert found == measured


def test_half_precision_is_summed_in_single() -> None:
    """10,000 ones: in bfloat16 a sum of ones stops at 256."""
    weight = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    measure = NormMeasure({"model.layers.1.mlp.up_proj.weight": weight}, 2)
    line = norms_line(measure.table(measure.squares()))
    assert line["mlp"] == line["total"] == 100.0
    assert line["layers"]["mlp"] == pytest.approx([math.nan, 100.0], nan_ok=True)


def test_a_gradient_that_is_no_number_is_not_taken_for_a_missing_one() -> None:
    weights = {f"model.layers.{layer}.mlp.up_proj.weight": nn.Parameter(torch.zeros(2)) for layer in range(2)}
    for weight, value in zip(weights.values(), (math.nan, 1.0), strict=True):
        weight.grad = torch.full_like(weight, value)
    measure = NormMeasure(weights, 2)
    line = norms_line(measure.table(measure.squares()))
    assert line["total"] == line["layers"]["mlp"][0] == math.inf


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", ("embedding", None)),
        ("lm_head.weight", ("head", None)),
        ("model.norm.weight", ("other", None)),
        ("model.layers.12.self_attn.q_norm.weight", ("attention", 12)),
        ("model.layers.3.post_attention_layernorm.weight", ("other", 3)),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", ("mlp", 3)),
        ("model.layers.3.mlp.gate.weight", ("mlp", 3)),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", ("attention", 3)),
        ("base_model.model.model.layers.30.mlp.down_proj.lora_B.default.weight", ("mlp", 30)),
        ("projector.weight", ("other", None)),
    ],
)
def test_names_tell_group_and_layer(name: str, place: tuple[str, int | None]) -> None:
    assert module_group(name) == place


def test_lines_of_another_program_are_passed_over() -> None:
    lines = [
        b"nonsense",
        b'{"step": 1}',
        b'{"step": 2, "total": 1, "mlp": "x", "layers": {"mlp": [1, "nan", 2], "a": 3}}',
    ]
    found = parse_norms(b"\n".join(lines))
    assert found.steps_S.tolist() == [2]
    assert found.group("total").tolist() == [1]
    assert np.isnan(found.group("mlp")).all()
    assert np.array_equal(found.layers("mlp"), [[1, math.nan, 2]], equal_nan=True)
    assert len(parse_norms(b"")) == 0
