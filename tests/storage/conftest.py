"""Places to store things: a folder, memory, and a real S3 server; the proxy stands before the server on demand."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import paths, retry
from tests.storage.proxy import FaultProxy
from tests.storage.server import Server, start_server

BUCKET = "tests"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s3-server")
    server = start_server(folder)
    with pytest.MonkeyPatch.context() as patch:
        use_environment(patch, server.environment())
        paths.store_of("s3://x")._client.create_bucket(Bucket=BUCKET)  # type: ignore[union-attr]
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _scratches() -> Iterator[str]:
    """Kept for all tests: multiprocessing's fork server has its socket in the first. Sockets allow only short paths."""
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _scratches: str) -> Path:
    """No long pauses between attempts; a cache and a temporary folder (this) of the test's own.

    Writers to object stores that are killed leave scratch in the temporary folder, and garbage collection looks there.
    """
    folder = tempfile.mkdtemp(prefix="", dir=_scratches)
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return Path(folder)


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own on the real server."""
    use_environment(monkeypatch, server.environment())
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The same server behind the fault proxy, for the whole test."""
    proxy = FaultProxy(server.port)
    use_environment(monkeypatch, server.environment(proxy.port))
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy: FaultProxy) -> str:
    """A prefix of its own behind the fault proxy."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The root of a run in each kind of storage."""
    if request.param == "folder":
        return str(tmp_path / "run")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return str(request.getfixturevalue("s3"))


def use_environment(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set the AWS variables and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in {"AWS_MAX_ATTEMPTS": "4", **variables}.items():
        patch.setenv(name, value)
