"""A token file larger than the cache is read by ranges: the same batches, a bounded cache, requests are counted."""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import Artifact, StoreError, write_artifact
from checkpoints.options import cache_limit
from modularforge.config_files import make_config
from modularforge.data import pieces, ranged_tokens, shards
from modularforge.data.loader import batches, mixed_batches
from modularforge.data.packing import Rows, example_batches
from modularforge.data.token_files import TokenFile, TokenFileWriter
from modularforge.run import Run
from modularforge.stored_tokens import partition_tokens, token_file
from tests.pipeline.test_preparation_tasks import configured, prepare
from tests.pipeline.test_token_shards import LIMITS, sharded_values
from tests.storage.proxy import FaultProxy

DOCUMENTS, LENGTH, CONTEXT = 300, 101, 16
BLOCK = 1 << 10


@pytest.fixture
def artifact(proxied: str, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A partition of 60,600 bytes, and another one that nobody asks for."""
    monkeypatch.setattr(ranged_tokens, "BLOCK_BYTES", BLOCK)
    monkeypatch.setenv("MODULARFORGE_CACHE_GB", "1e-5")  # ten blocks
    ids = np.random.default_rng(0).integers(0, 500, DOCUMENTS * LENGTH).astype(np.uint16)
    with write_artifact(f"{proxied}/partitions", "partitions", "f" * 32, {}, {}) as writer:
        for name in ("partition-0", "partition-1"):
            with TokenFileWriter(writer.folder, name, 500) as file:
                file.add(ids, np.full(DOCUMENTS, LENGTH), np.zeros(DOCUMENTS, np.int64))
        return writer.commit({})


def whole(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same in memory."""
    with monkeypatch.context() as patch:
        patch.delenv("MODULARFORGE_CACHE_GB")
        return np.array(token_file(artifact, "partition-0").tokens)


def ranged(artifact: Artifact) -> Any:
    """The tokens, which are read by ranges."""
    tokens: Any = token_file(artifact, "partition-0").tokens
    assert type(tokens) is ranged_tokens.RangedTokens
    return tokens


def test_batches_are_the_same_and_no_rank_reads_what_is_not_its_share(
    artifact: Artifact, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(artifact, monkeypatch)
    tokens = ranged(artifact)
    proxy.reset()
    for rank in range(2):
        found = batches(tokens, CONTEXT, 8, 3, rank=rank, world=2)
        alike = batches(expected, CONTEXT, 8, 3, rank=rank, world=2)
        for mine, other in islice(zip(found, alike, strict=True), 6):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
            assert mine[2] == other[2]
    counts = Counter(request.method for request in proxy.requests)
    assert counts == {"GET": tokens.requests}, "nothing is listed or looked at"
    assert all("range" in {name.lower() for name in request.headers} for request in proxy.requests)
    assert 0 < tokens.requests <= 2 * 2 * 6 * 4, "at most two blocks for each window of 4 in a batch"


def test_slices_whole_streams_and_mixed_batches_are_those_of_a_file(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, tokens = whole(artifact, monkeypatch), ranged(artifact)
    assert len(tokens) == tokens.size == len(expected)
    for chosen in (slice(0, 0), slice(5, 600), slice(-3, None), slice(511, 513), slice(0, 900, 7)):
        assert np.array_equal(tokens[chosen], expected[chosen])
    assert np.array_equal(np.asarray(tokens, dtype=np.int64), expected)
    mine = mixed_batches([tokens, tokens], [1, 2], 12, CONTEXT, 4, 5)
    other = mixed_batches([expected, expected], [1, 2], 12, CONTEXT, 4, 5)
    for one, two in zip(mine, other, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_no_more_than_the_limit_is_kept_and_what_is_kept_is_not_asked_for_again(
    artifact: Artifact, proxy: FaultProxy
) -> None:
    tokens = ranged(artifact)
    tokens[:]
    assert tokens.requests == -(-60_600 // BLOCK)
    assert os.fstat(tokens.file.fileno()).st_size <= 1e4
    proxy.reset()
    tokens[-2000:]
    assert not proxy.requests
    tokens[:10]
    tokens[:10]
    assert len(proxy.requests) == 1


def test_a_job_fetches_its_own_partition_alone(artifact: Artifact, scratch: Path, proxy: FaultProxy) -> None:
    proxy.reset()
    ranged(artifact)
    assert {request.path.rpartition("/")[2].partition("?")[0] for request in proxy.requests} == {
        "partition-0.offsets.npy",
        "partition-0.labels.npy",
    }


def test_partitions_in_spans_of_shards_on_a_store_are_read_by_ranges(
    proxied: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that tasks wrote to the store: windows, and rows of whole documents, are those of a file on a disk."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    for name, limit in LIMITS.items():
        monkeypatch.setattr(pieces, name, limit)
    values = sharded_values(tmp_path)
    here = configured(values, None, tmp_path / "here")
    there = make_config({**values, "output_dir": proxied, "cluster": {"prepare_tasks": 2}}, "tests")
    assert prepare(there) == prepare(here)
    monkeypatch.setenv("MODULARFORGE_CACHE_GB", "1e-5")
    monkeypatch.setattr(ranged_tokens, "BLOCK_BYTES", BLOCK)
    for is_apart in (False, True):
        mine, other = (partition_tokens(Run(config).require("partition"), 0, is_apart) for config in (there, here))
        spans: Any = mine.tokens
        assert type(spans.whole) is ranged_tokens.RangedTokens
        proxy.reset()
        pairs = zip(batches_of(mine, is_apart), batches_of(other, is_apart), strict=True)
        for (one, place), (two, position) in islice(pairs, 8):
            assert place == position
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
        assert {request.method for request in proxy.requests} == {"GET"}
        assert all("range" in {name.lower() for name in request.headers} for request in proxy.requests)
        assert os.fstat(spans.whole.file.fileno()).st_size <= 1e4


def batches_of(file: TokenFile, is_apart: bool) -> Any:
    stream: Any = file.whole
    if is_apart:
        return example_batches(Rows(stream, CONTEXT, 7), 4, 3)
    found = batches(file.tokens, CONTEXT, 4, 3)
    return (({"inputs": inputs, "targets": targets}, place) for inputs, targets, place in found)


@pytest.mark.parametrize("value", ["0", "-1", "much", "nan"])
def test_a_limit_that_is_no_number_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULARFORGE_CACHE_GB", value)
    with pytest.raises(StoreError, match="MODULARFORGE_CACHE_GB must be a number of GB above 0, but is"):
        cache_limit()
