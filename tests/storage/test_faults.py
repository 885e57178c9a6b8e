"""What networks, servers and disks do to the store: lost answers, failures, refusals, full disks (C4, C6, C16-C20)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from checkpoints import (
    AccessError,
    Artifact,
    ArtifactExistsError,
    MissingBucketError,
    StoreError,
    StoreFullError,
    UnreachableError,
    find_artifact,
    open_artifact,
    paths,
    retry,
    write_artifact,
)
from checkpoints.s3 import S3Store
from tests.storage.proxy import Fault, FaultProxy, Request, Rule, forward
from tests.storage.server import KEY, SECRET, Server, free_port
from tests.storage.signatures import wrong_signature

MANY_BYTES = 33 << 20  # three parts of an upload


def once(matches: Callable[[Request], bool], *faults: Fault) -> Rule:
    """The faults, one by one, for the first requests that match."""
    left = list(faults)
    return lambda request: left.pop(0) if left and matches(request) else None


def is_commit(request: Request) -> bool:
    return request.method == "PUT" and "manifest.json" in request.path


def write(url: str, content: bytes = b"x" * 100) -> Artifact:
    with write_artifact(url, "expert", "f") as writer:
        writer.write_chunks("weights.bin", [content])
        return writer.commit()


@pytest.mark.parametrize(
    "fault",
    [Fault("lose_answer"), Fault("reset"), Fault("answer", 500), Fault("answer", 409, "ConditionalRequestConflict")],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
@pytest.mark.parametrize("times", [1, 2])
def test_c4_an_unclear_answer_to_the_commit_is_resolved(
    proxy: FaultProxy, proxied: str, fault: Fault, times: int
) -> None:
    proxy.reset(once(is_commit, *[fault] * times))
    artifact = write(f"{proxied}/expert")
    assert open_artifact(artifact.url).manifest == artifact.manifest
    open_artifact(artifact.url).verify()


def test_c4_a_commit_that_succeeded_but_answers_412_is_a_success(
    server: Server, proxy: FaultProxy, proxied: str
) -> None:
    """Something on the way (a load balancer, an HTTP client) sends the PUT twice; the second one is refused."""
    sent: list[bytes] = []

    def send_twice(request: Request) -> Fault | None:
        first = lambda: sent.append(forward(request, server.port))  # noqa: E731
        return Fault("do", action=first) if is_commit(request) else None

    proxy.reset(send_twice)
    artifact = write(f"{proxied}/expert")
    assert [answer.split()[1] for answer in sent] == [b"200"]
    assert open_artifact(artifact.url).manifest == artifact.manifest


def test_c4_an_unclear_answer_that_hides_another_winner_is_a_loss(proxy: FaultProxy, proxied: str) -> None:
    url = f"{proxied}/expert"
    winner = write(url, b"winner")
    proxy.reset(once(is_commit, Fault("lose_answer")))
    with pytest.raises(ArtifactExistsError):
        write(url, b"loser")
    assert open_artifact(url).manifest == winner.manifest
    open_artifact(url).verify()


def test_c4_files_stay_when_it_is_unknown_whether_the_commit_happened(proxy: FaultProxy, proxied: str) -> None:
    """All answers after the commit are lost: the writer must report a failure, and must not delete its files."""
    committed: list[Request] = []

    def lose_all_after_commit(request: Request) -> Fault | None:
        committed.extend([request] if is_commit(request) else [])
        return Fault("lose_answer") if committed else None

    proxy.reset(lose_all_after_commit)
    with pytest.raises(UnreachableError, match="expert/manifest"):
        write(f"{proxied}/expert")
    proxy.reset()
    open_artifact(f"{proxied}/expert").verify()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("answer", 500, "InternalError"),
        Fault("answer", 503, "SlowDown"),
        Fault("reset"),
        Fault("lose_answer"),
        Fault("cut_answer"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.code}",
)
def test_c16_every_single_request_may_fail_once(
    proxy: FaultProxy, proxied: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """A write, a read and a deletion in which each request, one after the other, fails the first time."""
    seen: set[tuple[str, str]] = set()

    def first_time(request: Request) -> Fault | None:
        key = (request.method, request.path.split("uploadId")[0] + request.path[-14:])
        new = key not in seen
        seen.add(key)
        return fault if new else None

    proxy.reset(first_time)
    artifact = write(f"{proxied}/expert", b"x" * MANY_BYTES)
    artifact.verify()
    paths.remove(artifact.url)
    assert paths.walk(proxied) == []
    assert len(seen) >= 10
    if fault.kind == "answer":
        assert "attempt 2 of 4 follows in" in caplog.text


def test_c16_a_stalled_connection_times_out_and_is_tried_again(
    proxy: FaultProxy, proxied: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    proxy.reset(once(lambda request: request.method == "PUT", Fault("stall")))
    write(f"{proxied}/expert").verify()
    assert "attempt 2 of 4 follows" in caplog.text


def test_c16_retries_are_bounded(proxy: FaultProxy, proxied: str, caplog: pytest.LogCaptureFixture) -> None:
    proxy.reset(lambda request: Fault("answer", 503, "SlowDown"))
    with pytest.raises(UnreachableError, match=r"cannot read s3://tests/.*manifest\.json: .* failed 4 times"):
        find_artifact(f"{proxied}/expert")
    assert len(proxy.requests) == 4
    assert [record.levelno for record in caplog.records if record.name == "checkpoints"] == [logging.WARNING] * 3


def test_c16_pauses_grow_and_have_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.25)
    monkeypatch.setattr(time, "sleep", pauses.append)
    for attempt in range(1, 12):
        retry.wait("read", "s3://b/k", ConnectionError("x"), attempt, 12)
    assert pauses[0] < pauses[2] < pauses[5] <= 15 * 1.3
    assert max(pauses) <= 15 * 1.3


def test_c6_a_failed_upload_is_aborted(proxy: FaultProxy, proxied: str) -> None:
    seen: list[int] = []

    def refuse_second_part(request: Request) -> Fault | None:
        if "partNumber=1" in request.path:
            seen.append(len(paths.store_of(proxied).unfinished_uploads(proxied)))  # type: ignore[union-attr]
        return Fault("answer", 403, "AccessDenied") if "partNumber=2" in request.path else None

    proxy.reset(refuse_second_part)
    with pytest.raises(AccessError, match="upload"):
        write(f"{proxied}/expert", b"x" * MANY_BYTES)
    assert seen == [1]
    assert paths.store_of(proxied).unfinished_uploads(proxied) == []  # type: ignore[union-attr]
    assert paths.walk(proxied) == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", r"cannot read s3://tests/.*access is denied.*bucket tests, key .*manifest\.json"),
        (400, "ExpiredToken", "the session token has expired; get new credentials"),
        (403, "InvalidAccessKeyId", "does not accept these credentials .*check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "does not accept these credentials"),
        (403, "RequestTimeTooSkewed", "access is denied"),
        (501, "NotImplemented", "NotImplemented"),
    ],
)
def test_c18_a_refusal_is_not_retried_and_names_bucket_key_and_action(
    proxy: FaultProxy, proxied: str, status: int, code: str, message: str
) -> None:
    proxy.reset(lambda request: Fault("answer", status, code))
    with pytest.raises(StoreError, match=message):
        find_artifact(f"{proxied}/expert")
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_c18_wrong_keys_are_told_apart_from_an_empty_bucket(
    proxy: FaultProxy, proxied: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    proxy.reset(lambda request: wrong_signature(request, KEY, SECRET))
    write(f"{proxied}/expert").verify()
    monkeypatch.setenv(variable, "some-wrong-value")
    for action in (find_artifact, paths.list_folder, paths.walk, paths.exists, write):
        with pytest.raises(AccessError) as caught:
            action(f"{proxied}/other")
        assert f"{proxied}/other" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert "some-wrong-value" not in str(caught.value)


def test_no_credentials_is_its_own_error(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AccessError, match="no credentials were found"):
        write(f"{s3}/expert")


@pytest.mark.parametrize("how", ["key", "profile", "client_kwargs"])
def test_credentials_and_endpoint_may_come_from_fsspecs_configuration(
    proxy: FaultProxy, proxied: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    proxy.reset(lambda request: wrong_signature(request, KEY, SECRET))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    settings: dict[str, dict[str, object]] = {
        "key": {"key": KEY, "secret": SECRET, "endpoint_url": endpoint, "default_block_size": 1 << 20},
        "profile": {"profile": "mine", "endpoint_url": endpoint},
        "client_kwargs": {"client_kwargs": {**keys, "endpoint_url": endpoint}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", settings[how])
    write(f"{proxied}/expert").verify()
    monkeypatch.setitem(fsspec.config.conf, "s3", {**settings[how], "anon": True})
    with pytest.raises(AccessError, match="access is denied"):
        find_artifact(f"{proxied}/expert")


def test_c19_a_missing_bucket_is_not_an_empty_one(s3: str) -> None:
    for action in (find_artifact, paths.list_folder, paths.walk, paths.exists, write):
        with pytest.raises(MissingBucketError, match="the bucket no-such-bucket does not exist at http://127"):
            action("s3://no-such-bucket/run/expert")


def test_c19_a_wrong_endpoint_is_not_an_empty_bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://name:password@127.0.0.1:{free_port()}")
    for action in (find_artifact, paths.list_folder, paths.exists, write):
        with pytest.raises(UnreachableError, match="check AWS_ENDPOINT_URL") as caught:
            action(f"{s3}/expert")
        assert "password" not in str(caught.value)


def test_c19_a_missing_key_in_a_bucket_is_absent(s3: str) -> None:
    assert find_artifact(f"{s3}/expert") is None
    assert paths.list_folder(s3) == []
    assert not paths.exists(f"{s3}/expert")
    with pytest.raises(FileNotFoundError):
        paths.read_bytes(f"{s3}/expert")
    paths.remove(f"{s3}/expert")


def test_c20_a_full_object_store_fails_cleanly(proxy: FaultProxy, proxied: str) -> None:
    proxy.reset(lambda request: Fault("answer", 507, "QuotaExceeded") if request.method == "PUT" else None)
    with pytest.raises(StoreFullError, match="the disk or the quota is full"):
        write(f"{proxied}/expert")


FILL = """
import sys
import torch
from checkpoints.training import Checkpoint, load_newest_checkpoint, save_checkpoint
from checkpoints import StoreFullError
url, size = sys.argv[1], int(sys.argv[2])
save_checkpoint(url, Checkpoint(1, {"w": torch.ones(100)}, {}), "f", keep_last=1)
limit(size)
for _ in range(2):
    try:
        save_checkpoint(url, Checkpoint(2, {"w": torch.ones(size)}, {}), "f", keep_last=1)
    except StoreFullError as error:
        print(error)
assert load_newest_checkpoint(url, "f").tensors["w"].equal(torch.ones(100))
import os
assert os.listdir(url) == ["step-00000001"], os.listdir(url)
"""


def test_c20_a_disk_that_refuses_more_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """The kernel itself refuses, by a limit on the size of files."""
    limit = "import resource as r\ndef limit(size): r.setrlimit(r.RLIMIT_FSIZE, (size, r.RLIM_INFINITY))\n"
    done = run(limit + FILL, str(tmp_path / "job"), "1000000")
    assert done.stdout.count("the disk or the quota is full; free some space") == 2


def test_c20_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A small file system in memory, where the tests may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system; the test above uses a limit instead")
    try:
        done = run("def limit(size): pass" + FILL, str(tmp_path / "job"), "1000000")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert done.stdout.count("the disk or the quota is full; free some space") == 2


def test_clients_follow_changed_settings_and_work_after_a_fork(s3: str, server: Server) -> None:
    """A client of before the fork cannot be used in the child; the store opens one of its own."""
    write(f"{s3}/expert")
    child = os.fork()
    if child == 0:
        os._exit(0 if open_artifact(f"{s3}/expert").problems() == [] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": "."})


def is_bulk_delete(request: Request) -> bool:
    return request.method == "POST" and request.path.partition("?")[2].startswith("delete")


def some_objects(root: str, count: int) -> list[str]:
    urls = [f"{root}/part {k}%.bin" for k in range(count)]
    for url in urls:
        paths.replace_bytes(url, b"x")
    return urls


def test_many_objects_are_deleted_with_few_requests(proxy: FaultProxy, proxied: str, monkeypatch) -> None:
    monkeypatch.setattr("checkpoints.s3.KEYS_OF_A_DELETE", 10)
    urls = some_objects(proxied, 23)
    proxy.reset(once(is_bulk_delete, Fault("answer", 503, "SlowDown"), Fault("lose_answer")))
    paths.store_of(proxied).delete([*urls[:21], f"{proxied}/never was"])
    assert [info.url for info in paths.walk(proxied)] == sorted(urls[21:])
    assert sum(map(is_bulk_delete, proxy.requests)) == 3 + 2, "three batches, and two of them again"
    assert not [request for request in proxy.requests if request.method == "DELETE"]


@pytest.mark.parametrize("code", ["NotImplemented", "MethodNotAllowed"])
def test_a_store_without_bulk_deletion_is_asked_for_each(proxy: FaultProxy, proxied: str, code: str) -> None:
    urls = some_objects(proxied, 3)
    proxy.reset(lambda request: Fault("answer", 501, code) if is_bulk_delete(request) else None)
    paths.store_of(proxied).delete(urls)
    assert not paths.walk(proxied)
    assert [request.method for request in proxy.requests].count("DELETE") == 3


class Refusing:
    """A client of a store that refuses to delete two objects, and of another could not say yet whether it did."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.later = {"b"}

    def delete_objects(self, Bucket: str, Delete: dict[str, list[dict[str, str]]]) -> dict[str, object]:
        keys = [entry["Key"] for entry in Delete["Objects"]]
        self.asked.append(keys)
        errors = [{"Key": key, "Code": "InternalError", "Message": ""} for key in keys if key in self.later]
        self.later = set()
        errors += [{"Key": key, "Code": "NoSuchKey"} for key in keys if key == "gone"]
        return {"Errors": errors or [{"Key": key, "Code": "AccessDenied"} for key in keys if key == "held"]}


def test_what_was_not_deleted_is_asked_for_again_or_named() -> None:
    client = Refusing()
    S3Store(client).delete(["s3://bucket/a", "s3://bucket/b", "s3://bucket/gone"])
    assert client.asked == [["a", "b", "gone"], ["b"]]
    with pytest.raises(AccessError, match="cannot delete s3://bucket"):
        S3Store(client).delete(["s3://bucket/a", "s3://bucket/held"])
