"""What killed processes leave in a run is removed when a stage finishes, and nothing that is somebody's."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoints import AccessError, garbage, open_artifact, paths, write_artifact
from checkpoints.owners import Owner, claimed, owner_of, this_machine
from checkpoints.training import set_aside
from modularforge.settings import to_yaml
from tests.conftest import ROOT, prepare_data, tiny_config
from tests.mutation import FUZZ_INPUTS, texts, values
from tests.storage import jobs
from tests.storage.test_artifacts import make

DAY = 86400.0


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as one that started after all that the test does."""
    monkeypatch.setattr(garbage, "STARTED", time.time() + 3600)


def hidden(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*attempt-*"))


@contextmanager
def writer_process(url: str, resume: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written a file of an artifact and waits before the next."""
    code = (
        "import sys\nfrom checkpoints import write_artifact\n"
        f"with write_artifact({url!r}, 'expert', 'f', resume={resume!r}) as writer:\n"
        "    writer.write_json('a.json', 1)\n    print(writer.folder, flush=True)\n"
        "    sys.stdin.read(1)\n    writer.commit()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield process


def leave(url: str, resume: str = "") -> Path:
    """What a writer leaves that is killed after its first file."""
    with writer_process(url, resume) as process:
        process.kill()
    (folder,) = (path for path in Path(url).parent.glob(f".{Path(url).name}.attempt-*"))
    return folder


def grow_old(path: Path, seconds: float) -> None:
    for place in (*path.rglob("*"), path):
        os.utime(place, (time.time() - seconds,) * 2)


def say_owner(folder: Path, machine: str, resumes: bool = False) -> None:
    (folder / ".owner.json").write_text(json.dumps({"machine": machine, "resumes": resumes}))


def test_a_killed_writers_folder_is_removed_and_a_living_writers_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(str(run / "backbone"))
    left = leave(str(run / "experts" / "expert-0"))
    with writer_process(str(run / "experts" / "expert-1")) as living:
        assert garbage.sweep(str(run)) == [str(left)]
        assert len(hidden(run)) == 1
        assert living.stdin
        living.communicate(b"\n")
    assert open_artifact(str(run / "experts" / "expert-1")).read_json("a.json") == 1
    assert hidden(run) == []
    open_artifact(str(run / "backbone")).verify()


def test_what_killed_writers_of_one_artifact_left_is_removed_wherever_it_lies(tmp_path: Path) -> None:
    """Of a corpus outside of the run, a fetched model, a study's result: no stage sweeps there."""
    url = str(tmp_path / "data [v2]")
    leave(str(tmp_path / "data"))
    left = tmp_path / ".data [v2].attempt-0123456789ab"
    left.mkdir()
    with writer_process(url) as living:
        make(url)
        assert not left.exists()
        assert len(hidden(tmp_path)) == 2
        living.kill()
    open_artifact(url).verify()


def test_a_writer_that_is_stopped_for_a_while_is_not_taken_for_dead(tmp_path: Path) -> None:
    with writer_process(str(tmp_path / "run" / "expert")) as living:
        os.kill(living.pid, signal.SIGSTOP)
        (folder,) = (tmp_path / "run").iterdir()
        grow_old(folder, 30 * DAY)
        assert garbage.sweep(str(tmp_path / "run")) == []
        os.kill(living.pid, signal.SIGCONT)
        living.communicate(b"\n")
        assert living.returncode == 0
    open_artifact(str(tmp_path / "run" / "expert")).verify()


def test_what_was_written_since_this_process_started_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave(str(tmp_path / "run" / "expert"))
    monkeypatch.setattr(garbage, "STARTED", left.stat().st_mtime - 1)
    assert garbage.sweep(str(tmp_path / "run")) == []
    monkeypatch.setattr(garbage, "STARTED", time.time() + 1)
    assert garbage.sweep(str(tmp_path / "run")) == [str(left)]


@pytest.mark.parametrize("machine", ["another-machine", None])
def test_a_folder_of_another_machine_stays_for_a_day(machine: str | None, tmp_path: Path) -> None:
    """Its lock may not reach this machine; what says nothing counts as another's."""
    left = leave(str(tmp_path / "run" / "expert"))
    say_owner(left, machine) if machine else (left / ".owner.json").unlink()
    grow_old(left, 0.9 * DAY)
    assert garbage.sweep(str(tmp_path / "run")) == []
    grow_old(left, 1.1 * DAY)
    assert garbage.sweep(str(tmp_path / "run")) == [str(left)]


def test_where_no_locks_are_known_only_age_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave(str(tmp_path / "run" / "expert"))

    def no_locks(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert garbage.sweep(str(tmp_path / "run")) == []
    grow_old(left, 1.1 * DAY)
    assert garbage.sweep(str(tmp_path / "run")) == [str(left)]


def test_what_a_later_writer_goes_on_with_stays_until_its_artifact_is_finished(tmp_path: Path) -> None:
    url = str(tmp_path / "run" / "assembled")
    left = leave(url, resume="0123456789abcdef")
    assert owner_of(left) == Owner(this_machine(), resumes=True)
    assert garbage.sweep(str(tmp_path / "run")) == []
    make(url)
    assert not left.exists()


def test_a_finished_artifact_holds_no_note(tmp_path: Path) -> None:
    with write_artifact(str(tmp_path / "run" / "expert"), "expert", "f") as writer:
        assert owner_of(writer.folder) == Owner(this_machine(), resumes=False)
        writer.write_json("a.json", 1)
        artifact = writer.commit()
    assert sorted(path.name for path in (tmp_path / "run" / "expert").iterdir()) == ["a.json", "manifest.json"]
    assert list(artifact.manifest.files) == ["a.json"]


def test_a_deletion_that_was_cut_short_is_ended_and_a_damaged_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "job/step-00000001"):
        make(str(tmp_path / "run" / name))
    set_aside(str(tmp_path / "run" / "job" / "step-00000001"))
    with monkeypatch.context() as patch:
        patch.setattr("checkpoints.folder.shutil.rmtree", lambda *_, **__: None)
        paths.remove(str(tmp_path / "run" / "old"))
    left, kept = hidden(tmp_path / "run")
    assert garbage.sweep(str(tmp_path / "run")) == [str(tmp_path / "run" / left)]
    grow_old(tmp_path / "run" / kept, 30 * DAY)
    assert garbage.sweep(str(tmp_path / "run")) == []


def test_a_hidden_file_stays_while_it_is_written_and_for_an_hour(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    seen: list[list[str]] = []

    def parts() -> Iterator[bytes]:
        yield b"x"
        (scratch,) = run.iterdir()
        grow_old(scratch, 30 * DAY)
        seen.append(garbage.sweep(str(run)))
        yield b"y"

    paths.upload(str(run / "metrics.jsonl"), parts())
    assert seen == [[]]
    left = run / ".config.yaml.attempt-0123456789ab"
    left.write_bytes(b"")
    grow_old(left, 3000)
    assert garbage.sweep(str(run)) == []
    grow_old(left, 4000)
    assert garbage.sweep(str(run)) == [str(left)]
    assert (run / "metrics.jsonl").read_bytes() == b"xy"


def test_nothing_of_the_users_and_no_link_is_touched(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    left = leave(str(other / "expert"))
    run.mkdir()
    (run / left.name).symlink_to(left)
    (run / "linked").symlink_to(other)
    for name in (".hidden.attempt-x", "attempt-0123456789ab", ".attempt-0123456789ab", ".x.attempt-0123456789ab.bak"):
        (run / name).mkdir()
        grow_old(run / name, 30 * DAY)
    assert garbage.sweep(str(run)) == []
    assert left.exists()


def test_a_clock_that_jumps_keeps_more_and_never_less(tmp_path: Path) -> None:
    left = leave(str(tmp_path / "run" / "expert"))
    grow_old(left, -30 * DAY)
    assert garbage.sweep(str(tmp_path / "run")) == []


def test_a_hostile_note_is_no_note(tmp_path: Path) -> None:
    (tmp_path / ".owner.json").write_text(json.dumps({"machine": "x", "resumes": False}))
    whole = (tmp_path / ".owner.json").read_bytes()
    count = FUZZ_INPUTS // 4
    good = json.loads(whole)
    for content in [*texts([whole], count), *(json.dumps(value).encode() for value in values(good, count))]:
        (tmp_path / ".owner.json").write_bytes(content)
        found = owner_of(tmp_path)
        assert found is None or isinstance(found.machine, str)


def test_on_an_object_store_only_what_is_a_week_old_is_removed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(f"{s3}/backbone")
    paths.replace_bytes(f"{s3}/expert/attempt-0123456789ab/a.bin", b"x")
    assert garbage.sweep(s3) == []
    monkeypatch.setattr(garbage, "OBJECT_SECONDS", -5.0)
    assert garbage.sweep(s3) == [f"{s3}/expert/attempt-0123456789ab"]
    open_artifact(f"{s3}/backbone").verify()


def test_the_scratch_of_a_killed_writer_to_an_object_store_is_removed(s3: str, scratch: Path) -> None:
    with writer_process(f"{s3}/expert") as living:
        assert garbage.sweep(s3) == []
        living.kill()
    assert len(garbage.sweep(s3)) == 1
    assert not list(scratch.glob("modularforge-upload-*"))


def test_a_store_that_refuses_fails_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AccessError("no")

    monkeypatch.setattr(garbage, "find_garbage", refuse)
    assert garbage.sweep("memory://run") == []


def test_a_writer_goes_elsewhere_while_its_place_is_swept(tmp_path: Path) -> None:
    left = leave(str(tmp_path / "run" / "assembled"), resume="0123456789abcdef")
    with claimed(left) as is_mine:
        assert is_mine
        with write_artifact(str(tmp_path / "run" / "assembled"), "x", "f", resume="0123456789abcdef") as writer:
            assert writer.folder != left
            writer.commit()
    open_artifact(str(tmp_path / "run" / "assembled")).verify()


def killed_jobs(url: str, notes: Path, times: int) -> None:
    luck = random.Random(0)
    for _ in range(times):
        process = jobs.start(jobs.endless, url, notes)
        before = jobs.last_note(notes)
        jobs.wait_for(lambda before=before: jobs.last_note(notes) > before)  # type: ignore[misc]
        time.sleep(luck.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_after_sigkills_at_random_times_nothing_stays(times: int, tmp_path: Path) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    killed_jobs(str(run / "checkpoints" / "expert-0"), notes, times)
    before = hidden(run)
    garbage.sweep(str(run))
    assert [name for name in hidden(run) if (run / name).is_dir()] == []
    print(f"{times} SIGKILLs left {len(before)} folders and files")


def train_backbone(config_file: Path, dies: bool) -> int:
    """Train the backbone in a process of its own, which is killed where it would publish its first checkpoint."""
    code = (
        "import os, signal, sys\nfrom checkpoints.writer import ArtifactWriter\n"
        f"if {dies}:\n"
        "    ArtifactWriter._rename_into_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from modularforge.__main__ import main\n"
        f"sys.argv = ['modularforge', 'train', '--only', 'backbone', '--config', {str(config_file)!r}]\nmain()\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode


def test_the_next_stage_that_finishes_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    prepare_data(config)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(to_yaml(config))
    assert train_backbone(config_file, dies=True) == -signal.SIGKILL
    assert len(hidden(tmp_path / "run")) == 1
    assert train_backbone(config_file, dies=False) == 0
    assert hidden(tmp_path / "run") == []
    open_artifact(str(tmp_path / "run" / "backbone")).verify()
