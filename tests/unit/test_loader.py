"""Batches: the same whatever the number of ranks, wherever they start, and each token predicted once."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modularforge.data import loader
from modularforge.data.loader import IGNORED_TARGET, batches, evaluation_batches, label_tokens, mixed_batches
from modularforge.data.token_files import TokenFileWriter, open_token_file
from modularforge.errors import DataError, TrainingError

T = 5
TOKENS = np.arange(T * 13 + 3, dtype=np.uint16)


def take(count, **settings):
    return list(islice(batches(TOKENS, T, seed=3, **{"batch_size": 4} | settings), count))


def test_targets_are_the_next_tokens():
    inputs_BT, targets_BT, position = take(1)[0]
    assert inputs_BT.shape == targets_BT.shape == (4, T)
    assert inputs_BT.dtype == targets_BT.dtype == torch.int64
    assert torch.equal(targets_BT, inputs_BT + 1)
    assert position == 4


def test_an_epoch_visits_every_window_once_in_another_order_each_time():
    first = torch.cat([inputs_BT[:, 0] for inputs_BT, _, _ in take(26, batch_size=1)])
    assert first[:13].sort().values.tolist() == first[13:].sort().values.tolist() == list(range(0, 13 * T, T))
    assert first[:13].tolist() != first[13:].tolist()


def test_seeds_give_different_orders():
    orders = [next(batches(TOKENS, T, 13, seed))[0][:, 0].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


@settings(deadline=None)
@given(world=st.sampled_from([1, 2, 3, 6, 12]), restart_world=st.sampled_from([1, 2, 4]), steps=st.integers(0, 9))
def test_ranks_and_restarts_give_the_batches_of_one_uninterrupted_process(world, restart_world, steps):
    expected = take(steps + 3, batch_size=12)
    found = gather(steps, world, 0)
    position = found[-1][2] if found else 0
    found += gather(3, restart_world, position)
    for (inputs_BT, targets_BT, position), (inputs, targets, reached) in zip(expected, found, strict=True):
        assert torch.equal(inputs_BT, inputs)
        assert torch.equal(targets_BT, targets)
        assert position == reached


def gather(steps, world, start):
    """The batches of all ranks, put together as one process would see them."""
    ranks = [take(steps, batch_size=12, start_position=start, rank=rank, world=world) for rank in range(world)]
    return [
        (torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), parts[0][2])
        for parts in zip(*ranks, strict=True)
    ]


def test_a_partition_smaller_than_a_batch_is_refused():
    with pytest.raises(TrainingError, match=r"partition 2 must fill one batch of 14 x 5 tokens \(71\), but has 68"):
        next(batches(TOKENS, T, 14, 0, name="partition 2"))
    with pytest.raises(TrainingError, match="but has 0"):
        next(batches(TOKENS[:0], T, 1, 0))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(
        TrainingError, match=r"batch_size must be a multiple of the number of processes \(3\), but is 4"
    ):
        take(1, world=3)


@pytest.mark.parametrize("count", [2, T, T + 1, T + 2, 4 * T + 1, 68])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_predicts_every_token_once(count, batch_size):
    tokens = TOKENS[:count]
    inputs, targets = zip(*evaluation_batches(tokens, T, batch_size), strict=True)
    inputs_NT, targets_NT = torch.cat(inputs), torch.cat(targets)
    kept = targets_NT != IGNORED_TARGET
    assert targets_NT[kept].tolist() == tokens[1:].tolist()
    assert inputs_NT[kept].tolist() == tokens[:-1].tolist()
    assert inputs_NT.shape[1] == T
    assert max(map(len, inputs)) <= batch_size


def test_evaluation_stops_at_its_limit():
    targets = torch.cat([targets_BT for _, targets_BT in evaluation_batches(TOKENS, T, 2, max_tokens=12)])
    assert targets[targets != IGNORED_TARGET].tolist() == list(range(1, 13))


def test_evaluation_without_tokens_is_refused():
    with pytest.raises(DataError, match="must have at least 2 tokens, but has 1"):
        next(evaluation_batches(TOKENS[:1], T, 2))


def test_the_documents_of_one_label_follow_one_another(tmp_path):
    with TokenFileWriter(tmp_path, "test", 300) as writer:
        writer.add(np.arange(9), np.array([2, 3, 4]), np.array([1, 0, 1]))
    file = open_token_file(tmp_path, "test")
    assert label_tokens(file, 1).tolist() == [0, 1, 5, 6, 7, 8]
    assert label_tokens(file, 1, max_tokens=3).tolist() == [0, 1, 5, 6]
    assert label_tokens(file, 2).tolist() == []
    assert next(batches(file.tokens, 4, 2, 0))[0].shape == (2, 4)


STREAMS = [np.arange(k * 1000, k * 1000 + T * length + 1, dtype=np.uint16) for k, length in enumerate((13, 7, 9))]


def mixed(**settings):
    defaults = {"windows_each": 8, "context_length": T, "batch_size": 4, "seed": 5}
    return list(mixed_batches(STREAMS, [1, 2, 3], **defaults | settings))


def test_mixed_batches_are_the_very_windows_of_the_jobs_on_each_stream():
    """Also where a job sees its stream more than once: 8 windows of a stream that has 7."""
    rows = torch.cat([inputs_BT for inputs_BT, _, _ in mixed()]).tolist()
    own = [
        row
        for tokens, seed in zip(STREAMS, (1, 2, 3), strict=True)
        for inputs_BT, _, _ in islice(batches(tokens, T, 4, seed), 2)
        for row in inputs_BT.tolist()
    ]
    assert sorted(rows) == sorted(own)
    assert rows != own


def test_mixed_batches_are_the_same_on_any_ranks_and_from_any_start():
    whole = mixed()
    ranks = [mixed(rank=rank, world=2) for rank in (0, 1)]
    for (inputs_BT, targets_BT, position), first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(inputs_BT, torch.cat([first[0], second[0]]))
        assert torch.equal(targets_BT, torch.cat([first[1], second[1]]))
        assert position == first[2] == second[2]
    assert torch.equal(mixed(start_position=12)[0][0], whole[3][0])


def test_mixed_batches_of_another_size_are_the_same_windows_in_the_same_order():
    whole = torch.cat([inputs_BT for inputs_BT, _, _ in mixed()])
    assert torch.equal(torch.cat([inputs_BT for inputs_BT, _, _ in mixed(batch_size=6)]), whole)


def test_mixing_names_the_partition_that_fills_no_batch():
    with pytest.raises(TrainingError, match="partition 1 must fill one batch"):
        mixed(batch_size=8)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 4097, 65536])
def test_a_computed_order_is_a_permutation(count):
    keys = np.random.default_rng(count).integers(0, 1 << 64, loader.ROUNDS, np.uint64)
    found = loader.permuted(np.arange(count), count, keys)
    assert sorted(found) == list(range(count))
    others = loader.permuted(np.arange(count), count, keys + np.uint64(1))
    assert count < 17 or (found != others).any()
    if count >= 1000:  # as far apart as random numbers are, of which neighbours are a third of the range
        assert abs(np.abs(np.diff(found)).mean() / count - 1 / 3) < 0.03


@pytest.mark.parametrize("world", [1, 3])
def test_an_order_that_is_too_long_to_be_listed_is_computed_and_restarts(world, monkeypatch):
    listed = gather(5, 1, 0)
    monkeypatch.setattr(loader, "MOST_LISTED", 12)
    computed = gather(6, world, 0)
    first = torch.cat([inputs_BT[:, 0] for inputs_BT, _, _ in computed])
    assert first[:13].sort().values.tolist() == first[13:26].sort().values.tolist() == list(range(0, 13 * T, T))
    assert first[:13].tolist() != first[13:26].tolist()
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(listed, computed, strict=False))
    again = gather(3, 1, computed[2][2])
    assert all(torch.equal(one[0], other[0]) for one, other in zip(computed[3:], again, strict=True))
    order = loader.Order(10**9, seed=3)
    assert len(set(order.windows(10**9 - 50, 10**9 + 50))) == 100  # of two epochs, of which nothing is kept
    assert not order.permutations
