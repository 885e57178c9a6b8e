"""`python -m checkpoints`: list, verify, copy in both directions, resume copies, and collect garbage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from checkpoints import (
    ArtifactExistsError,
    CorruptArtifactError,
    StoreError,
    open_artifact,
    paths,
    transfer,
    write_artifact,
)
from checkpoints.artifact import find_artifacts
from checkpoints.copying import copy_artifact
from checkpoints.garbage import delete_garbage, find_garbage
from checkpoints.owners import locked
from checkpoints.training import load_newest_checkpoint, save_checkpoint
from tests.storage.proxy import Fault, FaultProxy, Request
from tests.storage.test_artifacts import make
from tests.storage.test_training_checkpoints import at, damage, same


def command(*arguments: str, code: int = 0) -> str:
    """Run the command as a user does and return what it prints."""
    call = [sys.executable, "-m", "checkpoints", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def make_run(url: str) -> str:
    """A run with two artifacts and the checkpoints of two jobs."""
    make(paths.join(url, "backbone"), 1)
    make(paths.join(url, "experts/expert-0"), 2)
    for step in (1, 2):
        save_checkpoint(paths.join(url, "checkpoints/backbone"), at(step), "f", keep_last=5)
        save_checkpoint(paths.join(url, "checkpoints/expert-0"), at(step * 10), "f", keep_last=5)
    return url


def names_below(url: str) -> list[str]:
    return [paths.relative(artifact.url, url) for artifact in find_artifacts(url)]


def files_of(url: str) -> dict[str, Any]:
    return {paths.relative(artifact.url, url): artifact.manifest.files for artifact in find_artifacts(url)}


def test_ls_shows_artifacts_and_checkpoints_with_step_and_size(s3: str) -> None:
    make_run(s3)
    text = command("ls", s3)
    for word in ("backbone", "experts/expert-0", "checkpoints/expert-0/step-00000020", "checkpoint", "20", "age"):
        assert word in text
    rows = json.loads(command("ls", s3, "--json"))
    assert [row["step"] for row in rows if row["kind"] == "checkpoint"] == [1, 2, 10, 20]
    assert all(row["size"] > 0 and row["age_seconds"] >= 0 for row in rows)


def test_verify_reads_every_byte_and_names_what_is_wrong(s3: str) -> None:
    make_run(s3)
    assert "6 artifacts, 14 files, 0 problems" in command("verify", s3)
    damage(paths.join(s3, "experts/expert-0"), "model.safetensors")
    found = json.loads(command("verify", s3, "--json", code=1))
    assert len(found["problems"]) == 1
    assert "model.safetensors" in found["problems"][0]
    assert "tensor first" in found["problems"][0]


def test_verify_of_a_run_in_a_folder_knows_artifacts_inside_others(tmp_path: Path) -> None:
    """Partitions lie within `data/`; what another writer has not finished there is no fault either."""
    make(str(tmp_path / "data"), 1)
    make(str(tmp_path / "data" / "partitions"), 2)
    (tmp_path / "data" / ".more.attempt-0123456789ab").mkdir()
    (tmp_path / "data" / ".more.attempt-0123456789ab" / "a.bin").touch()
    assert "2 artifacts, 6 files, 0 problems" in command("verify", str(tmp_path))
    (tmp_path / "data" / "partitions" / "extra.bin").touch()
    report = json.loads(command("verify", str(tmp_path), "--json", code=1))
    (problem,) = report["problems"]
    assert "partitions/extra.bin must not be there" in problem


def test_verify_goes_on_behind_a_damaged_manifest(place: str) -> None:
    if place.startswith("memory"):
        pytest.skip("another process does not see it")
    make_run(place)
    paths.replace_bytes(paths.join(place, "backbone/manifest.json"), b"{")
    damage(paths.join(place, "experts/expert-0"), "model.safetensors")
    problems = json.loads(command("verify", place, "--json", code=1))["problems"]
    assert ["backbone/manifest.json" in problems[0], "model.safetensors" in problems[1]] == [True, True]
    assert len(problems) == 2
    assert "backbone/manifest.json" in command("ls", place, code=2)


@pytest.mark.parametrize("verb", ["verify", "pull", "pull --newest"])
def test_a_checkpoint_that_its_job_deletes_meanwhile_is_no_damage(
    proxy: FaultProxy, proxied: str, tmp_path: Path, verb: str
) -> None:
    make_run(proxied)
    doomed = paths.join(proxied, "checkpoints/backbone/step-00000002")

    def rule(request: Any) -> Fault | None:
        is_read = request.method == "GET" and "backbone/step-00000002/attempt" in request.path
        return Fault("do", action=lambda: paths.remove(doomed)) if is_read else None

    proxy.reset(rule)
    if verb == "verify":
        assert "0 problems" in command("verify", proxied)
    elif verb == "pull":
        said = command("pull", proxied, str(tmp_path))
        assert "5 copied, 0 were there already\n1 passed over" in said
    else:
        assert "step-00000002 must stay to be copied" in command("pull", proxied, str(tmp_path), "--newest", code=2)
        assert "1 copied, 1 were there already" in command("pull", proxied, str(tmp_path), "--newest")


def test_pull_and_push_copy_a_whole_run_with_the_same_bytes(s3: str, tmp_path: Path) -> None:
    make_run(s3)
    here, there = str(tmp_path / "here"), s3 + "-copy"
    assert "6 copied, 0 were there already" in command("pull", s3, here)
    assert "0 copied, 6 were there already" in command("pull", s3, here)
    assert (tmp_path / "here/backbone/model.safetensors").exists(), "plain names in a folder"
    assert "6 copied" in command("push", here, there)
    assert files_of(s3) == files_of(here) == files_of(there)
    assert same(load_newest_checkpoint(paths.join(there, "checkpoints/backbone"), "f"), at(2))
    assert find_garbage(here, 0) == find_garbage(there, 0) == []


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_copies_go_on_past_what_is_damaged_and_list_it(verb: str, s3: str, tmp_path: Path) -> None:
    source, target = (s3, str(tmp_path / "run")) if verb == "pull" else (str(tmp_path / "run"), s3)
    make_run(source)
    paths.replace_bytes(paths.join(source, "metrics/backbone.jsonl"), b"1\n")
    manifest, flipped = (paths.join(source, name) for name in ("backbone/manifest.json", "experts/expert-0"))
    whole = paths.read_bytes(manifest)
    paths.replace_bytes(manifest, b"{")
    url = open_artifact(flipped).file_url("model.safetensors")
    weights = paths.read_bytes(url)
    damage(flipped, "model.safetensors")
    make(paths.join(target, "checkpoints/expert-0/step-00000010"))  # another artifact is in the way
    said = command(verb, source, target, code=1)
    assert "3 copied, 0 were there already\n1 of 1 settings, metrics and logs copied" in said
    assert "backbone/manifest.json must be an undamaged manifest" in said
    assert "tensor first" in said
    assert "but holds another artifact" in said
    assert "3 not copied, all others are; fix them and run it again" in said
    assert len(json.loads(command(verb, source, target, "--json", code=1))["problems"]) == 3
    paths.replace_bytes(manifest, whole)
    paths.replace_bytes(url, weights)
    paths.remove(paths.join(target, "checkpoints/expert-0/step-00000010"))
    assert "3 copied, 3 were there already" in command(verb, source, target)
    assert files_of(source) == files_of(target)


def test_the_newest_checkpoints_are_copied_past_a_damaged_one(tmp_path: Path) -> None:
    source = make_run(str(tmp_path / "run"))
    (tmp_path / "run/checkpoints/backbone/step-00000002/manifest.json").write_bytes(b"{")
    said = command("pull", "--newest", source, str(tmp_path / "copy"), code=1)
    assert "step-00000002/manifest.json must be" in said
    assert names_below(str(tmp_path / "copy")) == [
        "checkpoints/backbone/step-00000001", "checkpoints/expert-0/step-00000020",
    ]  # fmt: skip


def test_pull_and_push_bring_settings_metrics_and_logs_along(s3: str, tmp_path: Path) -> None:
    make_run(s3)
    loose = {"config.yaml": b"seed: 1\n", "metrics/backbone.jsonl": b"1\n2\n", "logs/expert-0.log": b"begun\n"}
    left = ["cluster/lock.json", ".hidden/a.log", "experts/expert-1/attempt-0123456789ab/a.log", "backbone/new.log"]
    for name, content in [*loose.items(), *((name, b"?") for name in left)]:
        paths.replace_bytes(paths.join(s3, name), content)
    here = tmp_path / "here"
    assert "3 of 3 settings, metrics and logs copied" in command("pull", s3, str(here))
    assert {name: (here / name).read_bytes() for name in loose} == loose
    assert not any((here / name).exists() for name in left)
    paths.replace_bytes(paths.join(s3, "config.yaml"), b"seed: 2\n")
    (here / "metrics/backbone.jsonl").write_bytes(b"1\n2\n3\n")
    report = json.loads(command("pull", s3, str(here), "--json"))
    assert (report["files"], report["copied_files"]) == (3, [str(here / "config.yaml")])
    assert (here / "metrics/backbone.jsonl").read_bytes() == b"1\n2\n3\n", "what went on here stays"
    assert "3 of 3" in command("push", str(here), f"{s3}-copy")
    assert paths.read_bytes(f"{s3}-copy/metrics/backbone.jsonl") == b"1\n2\n3\n"
    assert "settings" not in command("pull", "--newest", s3, str(tmp_path / "newest"))
    assert not (tmp_path / "newest" / "config.yaml").exists()


def test_a_terminal_sees_a_progress_bar_and_a_script_does_not(s3: str, tmp_path: Path) -> None:
    artifact = make(f"{s3}/expert")
    assert "━" not in command("pull", s3, str(tmp_path / "script"))
    leader, follower = os.openpty()
    call = [sys.executable, "-m", "checkpoints", "pull", s3, str(tmp_path / "terminal")]
    with subprocess.Popen(
        call, stdout=subprocess.DEVNULL, stderr=follower, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(follower)
        seen = b""
        with suppress(OSError):  # the other end is closed when the command has ended
            while part := os.read(leader, 4096):
                seen += part
    os.close(leader)
    assert process.returncode == 0
    assert "━" in seen.decode()
    size = decimal(artifact.manifest.size).split()[0]
    assert f"{size}/{size}" in seen.decode(), "all bytes were counted"


def test_pull_one_artifact_or_only_the_newest_checkpoints(s3: str, tmp_path: Path) -> None:
    make_run(s3)
    command("pull", paths.join(s3, "backbone"), str(tmp_path / "backbone"))
    open_artifact(str(tmp_path / "backbone")).verify()
    command("pull", "--newest", s3, str(tmp_path / "run"))
    newest = ["checkpoints/backbone/step-00000002", "checkpoints/expert-0/step-00000020"]
    assert names_below(str(tmp_path / "run")) == newest


def test_errors_are_one_message_and_exit_code_2(s3: str, tmp_path: Path) -> None:
    assert "error: s3://no-such-bucket" not in command("ls", "s3://no-such-bucket", code=2)
    assert "the bucket no-such-bucket does not exist" in command("ls", "s3://no-such-bucket", code=2)
    assert "must hold a committed artifact" in command("verify", s3, code=2)
    make(paths.join(s3, "backbone"))
    assert "must hold a training checkpoint" in command("pull", s3, str(tmp_path / "run"), "--newest", code=2)
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file/.backbone" in command("pull", s3, str(tmp_path / "file"), code=2)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_PROFILE"])
def test_settings_that_make_no_client_are_named(s3: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "nonsense")
    said = command("ls", s3, code=2)
    assert "nonsense" in said
    assert "fix AWS_ENDPOINT_URL, AWS_PROFILE" in said


def test_an_interrupted_pull_goes_on_where_it_stopped(proxy: FaultProxy, proxied: str, tmp_path: Path) -> None:
    """The first try is refused the last part; the second fetches only what lies behind the bytes that came."""
    from checkpoints import write_artifact

    with write_artifact(f"{proxied}/big", "expert", "f") as writer:
        writer.write_chunks("big.bin", [bytes([i]) * (8 << 20) for i in range(10)])
        source = writer.commit()
    proxy.reset(lambda request: Fault("answer", 403, "AccessDenied") if start_of(request) >= 72 << 20 else None)
    with pytest.raises(StoreError, match="access is denied"):
        copy_artifact(source, str(tmp_path / "big"), lambda size: None)
    assert not (tmp_path / "big").exists()
    (left,) = (path.stat().st_size for path in tmp_path.glob(".big.*/big.bin"))
    proxy.reset()
    done: list[int] = []
    assert copy_artifact(source, str(tmp_path / "big"), done.append)
    assert min(start_of(request) for request in proxy.requests if "Range" in request.headers) == left
    assert sum(done) == source.manifest.size
    open_artifact(str(tmp_path / "big")).verify()
    assert sorted(os.listdir(tmp_path / "big")) == ["big.bin", "manifest.json"]


def start_of(request: Request) -> int:
    """The first byte that is asked for, or -1."""
    return int(request.headers.get("Range", "bytes=-1-").removeprefix("bytes=").split("-")[0] or -1)


def test_an_interrupted_push_goes_on_where_it_stopped(proxy: FaultProxy, proxied: str, tmp_path: Path) -> None:
    source = make(str(tmp_path / "expert"))
    refuse = lambda request: Fault("answer", 403, "AccessDenied") if "tokens.bin" in request.path else None  # noqa: E731
    proxy.reset(refuse)
    with pytest.raises(StoreError, match="access is denied"):
        copy_artifact(source, f"{proxied}/expert", lambda size: None)
    proxy.reset()
    assert copy_artifact(source, f"{proxied}/expert", lambda size: None)
    assert not any("model.safetensors" in request.path for request in proxy.requests if request.method == "PUT")
    open_artifact(f"{proxied}/expert").verify()


def test_a_damaged_beginning_of_an_interrupted_pull_is_fetched_again(s3: str, tmp_path: Path) -> None:
    source = make(f"{s3}/expert")
    copy_artifact(source, str(tmp_path / "probe"), lambda size: None)
    attempt = open_artifact(str(tmp_path / "probe")).manifest.attempt
    begun = tmp_path / f".expert.{attempt}"
    begun.mkdir()
    (begun / "tokens.bin").write_bytes(b"?" * 500)
    (begun / "model.safetensors").write_bytes(b"?" * 10_000)
    assert copy_artifact(source, str(tmp_path / "expert"), lambda size: None)
    open_artifact(str(tmp_path / "expert")).verify()


def test_two_pulls_at_once_do_not_write_the_same_files(s3: str, tmp_path: Path) -> None:
    source = make(f"{s3}/expert")
    copy_artifact(source, str(tmp_path / "probe"), lambda size: None)
    begun = tmp_path / f".expert.{open_artifact(str(tmp_path / 'probe')).manifest.attempt}"
    begun.mkdir()
    with locked(begun) as is_mine:
        assert is_mine
        with pytest.raises(StoreError, match="another copy is running"):
            copy_artifact(source, str(tmp_path / "expert"), lambda size: None)


def test_a_damaged_source_is_not_copied(place: str, tmp_path: Path) -> None:
    source = make(paths.join(place, "expert"))
    damage(source.url, "model.safetensors")
    for target in (str(tmp_path / "copy"), f"memory://{tmp_path.name}/copy"):
        with pytest.raises(CorruptArtifactError, match="tensor first"):
            copy_artifact(source, target, lambda size: None)
        assert not paths.exists(f"{target}/manifest.json")


def test_a_copy_does_not_replace_another_artifact(place: str, tmp_path: Path) -> None:
    source, other = make(paths.join(place, "expert"), 1), make(str(tmp_path / "other"), 2)
    with pytest.raises(ArtifactExistsError, match="but holds another artifact"):
        copy_artifact(source, other.url, lambda size: None)
    open_artifact(other.url).verify()


def test_gc_finds_only_what_the_store_left_behind(place: str, tmp_path: Path) -> None:
    make_run(place)
    local = paths.is_local(place)
    left = ".expert-1.attempt-0123456789ab" if local else "expert-1/attempt-0123456789ab"
    mine = ["notes.txt", "experts/readme/notes.txt", ".hidden/file", "backbone-old/model.safetensors"]
    for name in [f"experts/{left}/a.bin", f"experts/{left}/b.bin", *mine]:
        paths.replace_bytes(paths.join(place, name), b"x")
    assert find_garbage(place, grace_seconds=3600) == [], "somebody may still be writing it"
    found = find_garbage(place, grace_seconds=0)
    assert [(item.url, item.size) for item in found] == [(paths.join(place, "experts", left), 2)]
    delete_garbage(found)
    assert find_garbage(place, grace_seconds=0) == []
    assert all(paths.exists(paths.join(place, name)) for name in mine)
    assert len(find_artifacts(place)) == 6
    for artifact in find_artifacts(place):
        artifact.verify()


def test_gc_leaves_an_attempt_that_was_committed_meanwhile(s3: str) -> None:
    artifact = make(f"{s3}/expert")
    manifest = paths.join(artifact.url, "manifest.json")
    content = paths.read_bytes(manifest)
    paths.remove(manifest)
    found = find_garbage(s3, grace_seconds=0)
    assert len(found) == 1
    paths.create_bytes(manifest, content)
    delete_garbage(found)
    open_artifact(artifact.url).verify()


def test_gc_leaves_folders_of_living_writers_and_takes_those_of_killed_ones(place: str, scratch: Path) -> None:
    """A writer in a process of its own is seen alive, whatever its age, and is garbage once it was killed."""
    (scratch / "modularforge-prepare-1").mkdir()
    url = place.replace("memory://", "s3://") if place.startswith("memory") else place
    code = (
        "import sys\nfrom pathlib import Path\nfrom checkpoints import write_artifact\n"
        f"with write_artifact({url!r} + '/expert', 'expert', 'f') as writer:\n"
        "    Path(writer.folder, 'a.bin').write_bytes(b'xy')\n"
        "    print(writer.folder, flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        folder = process.stdout.readline().decode().strip()
        assert folder
        assert find_garbage(place, grace_seconds=0) == []
        process.kill()
    found = find_garbage(place, grace_seconds=0)
    assert [item.url for item in found] == [folder]
    delete_garbage(found)
    assert find_garbage(place, grace_seconds=0) == []
    assert (scratch / "modularforge-prepare-1").is_dir()


def test_gc_finds_more_uploads_than_one_answer_holds(proxy: FaultProxy, proxied: str) -> None:
    store: Any = paths.store_of(proxied)
    names = [f"{proxied}/expert/attempt-0123456789ab/{number:04d}.bin" for number in range(1005)]
    for name in names:
        store._request("start", name, "create_multipart_upload")
    proxy.reset()
    assert [item.url for item in find_garbage(proxied, grace_seconds=0)] == names
    assert sum("uploads" in request.path for request in proxy.requests) == 2


def test_gc_aborts_unfinished_uploads(s3: str) -> None:
    make(f"{s3}/expert")
    store: Any = paths.store_of(s3)
    store._request("start", f"{s3}/expert-1/attempt-0123456789ab/a.bin", "create_multipart_upload")
    assert find_garbage(s3, grace_seconds=3600) == []
    assert "unfinished upload" in command("gc", s3, "--grace-hours", "0")
    assert len(store.unfinished_uploads(s3)) == 1, "only listed"
    time.sleep(0.01)
    report = json.loads(command("gc", s3, "--grace-hours", "0", "--delete", "--json"))
    assert report["deleted"]
    assert len(report["garbage"]) == 1
    assert store.unfinished_uploads(s3) == []


def test_the_command_starts_without_torch_and_network_code() -> None:
    code = "import sys, checkpoints.__main__; print({'torch', 's3fs', 'botocore', 'aiohttp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_small_artifacts_are_copied_side_by_side_but_not_into_one_that_is_not_there_yet(
    place: str, tmp_path: Path, monkeypatch
) -> None:
    for name in ("data", "data/partitions", "data-2", *(f"experts/expert-{k}" for k in range(5))):
        with write_artifact(f"{place}/{name}", "x", "f") as writer:
            writer.write_chunks("a.bin", [name.encode()])
            writer.commit()
    running: list[int] = []
    most: list[int] = []
    original = copy_artifact

    def copy(*arguments: Any) -> bool:
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        done = original(*arguments)
        running.pop()
        return done

    monkeypatch.setattr(transfer, "copy_artifact", copy)
    found = transfer.transfer(transfer.select(place, newest=False), str(tmp_path / "copy"), lambda _: None)
    assert found.copied == [f"{tmp_path}/copy/{name}" for name in names_below(place)]
    assert not found.problems
    assert max(most) > 1
    assert (tmp_path / "copy/data/partitions/a.bin").read_text() == "data/partitions"
