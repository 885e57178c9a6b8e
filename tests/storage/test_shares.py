"""What ranks ask of a store when they begin: each byte once a job, or a machine, counted behind a real S3 server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from checkpoints import CorruptArtifactError, open_artifact, write_artifact
from checkpoints.pieces import weight_parts
from checkpoints.safetensors import USUAL_HEADER_BYTES
from checkpoints.sharing import read_share
from checkpoints.training import Checkpoint, save_checkpoint
from tests.storage.proxy import FaultProxy
from tests.storage.test_pieces import save_in
from tests.storage.test_training_checkpoints import damage

TENSORS, ROWS, RANKS = 12, 4096, 4
BYTES = ROWS * 4 * 4


def asked_bytes(proxy: FaultProxy, name: str) -> int:
    """Bytes of a file that were asked for, by the ranges of requests."""
    total = 0
    for request in proxy.requests:
        spans = [value for key, value in request.headers.items() if key.lower() == "range"]
        if request.method == "GET" and request.path.partition("?")[0].endswith(name) and spans:
            first, last = spans[0].removeprefix("bytes=").split("-")
            total += int(last) + 1 - int(first)
    return total


def test_ranks_read_a_checkpoint_of_another_layout_once_between_them(proxied: str, proxy: FaultProxy) -> None:
    tensors = {f"weights.{index}": torch.rand(ROWS, 4) for index in range(TENSORS)}
    save_checkpoint(proxied, Checkpoint(3, tensors, {}), "f", 1)
    found: dict[str, torch.Tensor] = {}
    for rank in range(RANKS):
        proxy.reset()
        step = open_artifact(f"{proxied}/step-00000003")
        shares = read_share(weight_parts(step), rank, RANKS)
        data = TENSORS * BYTES // RANKS
        assert data <= asked_bytes(proxy, "state.safetensors") <= data + USUAL_HEADER_BYTES
        for number, content in shares.own.items():
            name = shares.units[number].name
            assert name not in found
            found[name] = content.view(torch.float32).reshape(ROWS, 4)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_changed_byte_is_found_by_the_rank_whose_share_it_is(place: str) -> None:
    save_in(place, 1, 2)
    damage(f"{place}/pieces-00000001/2-of-2")
    failed = []
    for rank in range(3):
        try:
            read_share(weight_parts(open_artifact(f"{place}/step-00000001")), rank, 3)
        except CorruptArtifactError:
            failed.append(rank)
    assert len(failed) == 1


@pytest.mark.parametrize("together", [2, 4])
def test_processes_of_a_machine_that_begin_together_fetch_a_file_once(
    together: int, proxied: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 4096
    with write_artifact(f"{proxied}/model", "model", "f" * 32, {}, {}) as writer:
        (writer.folder / "model.bin").write_bytes(content)
        artifact = writer.commit({})
    proxy.reset()
    with ThreadPoolExecutor(together) as threads:
        files = [*threads.map(lambda _: artifact.local_file("model.bin"), range(together))]
    assert {file.read_bytes() == content for file in files} == {True}
    assert asked_bytes(proxy, "model.bin") in (0, len(content))
    gets = [request for request in proxy.requests if request.method == "GET" and "model.bin" in request.path]
    assert len(gets) == 1
