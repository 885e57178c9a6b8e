"""Sums of tensors in committed files: by hand, in any order, block by block, and never of what was changed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from checkpoints import Artifact, write_artifact
from checkpoints.safetensors import TensorSpan
from modularforge.assembly import shared
from modularforge.assembly.plan import spans_of
from modularforge.assembly.shared import SHARED_NAME, Sums, Term, chunks, means, outer_step, write_means
from modularforge.config import OuterConfig
from modularforge.errors import MismatchError
from modularforge.routing.text_counts import COUNTS_NAME, only_tokens, save_counts, token_occurrences

Values = Mapping[str, Any]


def f32(values: Any) -> Any:
    return np.asarray(values, np.float32)


def artifact(folder: Path, values: Values | None, tokens: int = 1, name: str = SHARED_NAME) -> Artifact:
    """An artifact with these shared weights; None of an expert that trained none."""
    with write_artifact(str(folder), "expert", "0" * 32) as writer:
        if values is None:
            writer.write_json("nothing.json", {})
        else:
            save_file(dict(values), writer.folder / name, metadata={"format": "pt"})
        return writer.commit({"partition_tokens": tokens})


@pytest.fixture
def base(tmp_path: Path) -> Artifact:
    return artifact(tmp_path / "base", {"a": f32([1, 2, 3]), "b": f32([[10, 20]])})


def written(path: Path, sums: Sums, dtype: str = "F32") -> dict[str, Any]:
    path.write_bytes(b"".join(chunks(sums, dict.fromkeys(sums, dtype))))
    return load_file(path)


def test_a_mean_is_what_one_computes_by_hand(base: Artifact, tmp_path: Path) -> None:
    experts = [
        artifact(tmp_path / "0", {"a": f32([1, 4, 9])}, tokens=300),
        artifact(tmp_path / "1", {"a": f32([3, 0, 1]), "b": f32([[0, 0]])}, tokens=100),
    ]
    spans = spans_of(base, SHARED_NAME)
    equal = written(tmp_path / "equal", means(spans, experts, "equal"))
    assert equal["a"].tolist() == [2, 2, 5]
    assert equal["b"].tolist() == [[5, 10]], "an expert that left a tensor as it was counts with the base's"
    by_tokens = written(tmp_path / "tokens", means(spans, experts, "tokens"))
    assert by_tokens["a"].tolist() == [1.5, 3, 7]
    assert by_tokens["b"].tolist() == [[7.5, 15]]


def test_rows_weigh_by_how_often_an_experts_text_has_their_token(tmp_path: Path) -> None:
    name, other = "model.embed_tokens.weight", "model.norm.weight"
    base = artifact(tmp_path / "base", {name: f32([[0, 0], [10, 20], [5, 5]]), other: f32([1, 1])})
    counts = [[0, 3000, 0], [0, 1000, 9000]]
    rows = [[[8, 8], [20, 30], [-9, -9]], [[-7, 3], [0, 10], [15, 5]]]
    experts = []
    for index, (tokens, own) in enumerate(zip(counts, rows, strict=True)):
        folder = tmp_path / str(index)
        with write_artifact(str(folder), "expert", "0" * 32) as writer:
            save_file({name: f32(own), other: f32([index, index])}, writer.folder / SHARED_NAME)
            save_counts(writer.folder / COUNTS_NAME, only_tokens(np.array(tokens, float)))
            experts.append(writer.commit({"partition_tokens": 1}))
    spans = spans_of(base, SHARED_NAME)
    found = written(tmp_path / "mean", means(spans, experts, "counts", token_occurrences))
    assert found[name][0].tolist() == [0, 0], "nobody has the token: as it was"
    assert np.allclose(found[name][1], (3 * f32([20, 30]) + f32([0, 10]) + f32([10, 20])) / 5)
    assert np.allclose(found[name][2], (9 * f32([15, 5]) + f32([5, 5])) / 10), "who never met it has no say"
    assert found[other].tolist() == [0.5, 0.5], "all else alike"
    again = written(tmp_path / "again", means(spans, experts[::-1], "counts", token_occurrences))
    assert np.array_equal(again[name], found[name])


def test_rows_cannot_weigh_by_counts_that_are_not_there(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    base, expert = (artifact(tmp_path / at, {name: f32([[0, 0], [1, 1]])}) for at in ("base", "0"))
    with pytest.raises(MismatchError, match=r"must have counts of its text .* set assembly\.shared to equal"):
        means(spans_of(base, SHARED_NAME), [expert], "counts", token_occurrences)


def test_experts_that_trained_nothing_shared_leave_the_base_alone(base: Artifact, tmp_path: Path) -> None:
    experts = [artifact(tmp_path / str(k), None) for k in range(2)]
    assert write_means(tmp_path / "mean", spans_of(base, SHARED_NAME), experts, "tokens") == {}
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_order_of_experts_changes_no_bit(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "BLOCK_VALUES", 1000)
    draw = np.random.default_rng(0)
    experts = [
        artifact(tmp_path / f"e{k}", {"a": draw.normal(0, 10.0**k, 2345).astype(np.float32)}) for k in range(-3, 4)
    ]
    spans = spans_of(experts[0], SHARED_NAME)
    found = set()
    for seed in range(4):
        random.Random(seed).shuffle(experts)
        sums = means(spans, experts, "equal")
        found.add(b"".join(chunks(sums, dict.fromkeys(sums, dtype))))
    assert len(found) == 1
    if dtype == "F32":
        each = [load_file(expert.local_file(SHARED_NAME))["a"].astype(np.float64) for expert in experts]
        assert np.allclose(written(tmp_path / "mean", sums)["a"], np.mean(each, axis=0), rtol=1e-6)


def test_outer_steps_are_those_of_sgd_with_nesterov_momentum(base: Artifact, tmp_path: Path) -> None:
    outer, start = OuterConfig(rate=0.7, momentum=0.9), load_file(base.local_file(SHARED_NAME))
    weight = torch.nn.Parameter(torch.from_numpy(start["a"].copy()).double())
    optimizer = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    at, momentum = spans_of(base, SHARED_NAME), dict[str, TensorSpan]()
    for number, target in enumerate([[2.0, 2, 2], [0.0, 5, 2], [1.0, 1, 1]]):
        expert = artifact(tmp_path / f"e{number}", {"a": f32(target)})
        weight.grad = weight.detach() - torch.tensor(target, dtype=torch.float64)
        optimizer.step()
        steps, momenta = outer_step(means(at, [expert], "equal"), at, momentum, outer)
        merged = artifact(tmp_path / f"m{number}", written(tmp_path / f"w{number}", steps))
        moment = artifact(tmp_path / f"v{number}", written(tmp_path / f"u{number}", momenta))
        at, momentum = spans_of(merged, SHARED_NAME), spans_of(moment, SHARED_NAME)
        assert np.allclose(load_file(merged.local_file(SHARED_NAME))["a"], weight.detach().numpy(), atol=1e-5)


def test_a_changed_byte_and_another_shape_are_refused(base: Artifact, tmp_path: Path) -> None:
    spans = spans_of(base, SHARED_NAME)
    other = artifact(tmp_path / "other", {"a": f32([1, 2])})
    with pytest.raises(MismatchError, match=r"a in .*other.* must have the shape \(3,\) of the other experts', but"):
        list(chunks({"a": [Term(spans["a"], 0.5), *means(spans, [other], "equal")["a"]]}, {"a": "F32"}))
    path = base.local_file(SHARED_NAME)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[spans["a"].start] ^= 1
    path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"a in .*base.* must have the hash that its manifest says"):
        list(chunks({"a": [Term(spans["a"], 1.0)]}, {"a": "F32"}))


def test_memory_is_a_few_blocks_however_many_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(shared, "BLOCK_VALUES", 1 << 12)
    values = np.ones(1 << 17, np.float32)
    experts = [artifact(tmp_path / str(k), {"a": values * k}) for k in range(40)]
    sums = means(spans_of(experts[0], SHARED_NAME), experts, "equal")
    tracemalloc.start()
    for _ in chunks(sums, {"a": "F32"}):
        pass
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 16 * 8 * (1 << 12), "blocks of 16 KB, of one expert's tensor of 512 KB"
