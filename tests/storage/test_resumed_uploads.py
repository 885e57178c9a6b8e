"""An upload that was cut off goes on within the file: parts that S3 has are not sent again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoints import CorruptArtifactError, StoreError, open_artifact, paths, write_artifact, writer
from checkpoints.copying import copy_artifact
from checkpoints.s3 import S3Store
from checkpoints.writer import SMALL_PART_BYTES
from tests.storage.proxy import Fault, FaultProxy, Request

PARTS = 5
CONTENT = os.urandom(SMALL_PART_BYTES * (PARTS - 1) + 100)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", SMALL_PART_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> str:
    with write_artifact(str(tmp_path / "backbone"), "backbone", "f") as one:
        one.write_chunks("a.bin", [CONTENT])
        one.commit()
    return str(tmp_path / "backbone")


def is_part(request: Request) -> bool:
    return request.method == "PUT" and "partNumber" in request.path


def cut_off(proxy: FaultProxy, source: str, target: str, number: str) -> None:
    """A push that is refused one part, for good."""
    proxy.reset(lambda r: Fault("answer", 403, "AccessDenied") if f"partNumber={number}" in r.path else None)
    with pytest.raises(StoreError):
        copy_artifact(open_artifact(source), target, lambda _: None)


def test_parts_that_are_there_are_not_sent_again(proxy: FaultProxy, proxied: str, source: str) -> None:
    cut_off(proxy, source, proxied, "4")
    proxy.reset()
    copy_artifact(open_artifact(source), proxied, lambda _: None)
    sent = [request.path for request in proxy.requests if is_part(request)]
    assert 1 <= len(sent) <= 2, "the refused part, and one that was not begun"
    open_artifact(proxied).verify()
    store = paths.store_of(proxied)
    assert isinstance(store, S3Store)
    assert store.unfinished_uploads(proxied) == []


def test_parts_of_other_bytes_are_sent_again(proxy: FaultProxy, proxied: str, source: str) -> None:
    cut_off(proxy, source, proxied, "4")
    store = paths.store_of(proxied)
    assert isinstance(store, S3Store)
    [(info, upload_id)] = store.unfinished_uploads(proxied)
    other = bytes(SMALL_PART_BYTES)
    store._request("upload", info.url, "upload_part", UploadId=upload_id, PartNumber=2, Body=other)
    proxy.reset()
    copy_artifact(open_artifact(source), proxied, lambda _: None)
    assert any("partNumber=2" in request.path for request in proxy.requests if is_part(request))
    open_artifact(proxied).verify()


def test_parts_of_a_damaged_source_are_thrown_away(proxied: str, source: str) -> None:
    damaged = bytearray(CONTENT)
    damaged[-1] ^= 1
    (Path(source) / "a.bin").write_bytes(damaged)
    with pytest.raises(CorruptArtifactError):
        copy_artifact(open_artifact(source), proxied, lambda _: None)
    store = paths.store_of(proxied)
    assert isinstance(store, S3Store)
    assert store.unfinished_uploads(proxied) == []


def test_an_upload_that_another_process_has_ended_is_said(proxy: FaultProxy, proxied: str, source: str) -> None:
    cut_off(proxy, source, proxied, "4")
    proxy.reset(lambda r: Fault("answer", 404, "NoSuchUpload") if is_part(r) else None)
    with pytest.raises(StoreError, match="another process has ended it; run the same command again"):
        copy_artifact(open_artifact(source), proxied, lambda _: None)
