"""Training checkpoints: what is kept, what is loaded, and what is refused (C2, C7, C8, C11, C12, C14, C15)."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import checkpoints
from checkpoints import ArtifactExistsError, CorruptArtifactError, StoreError, open_artifact, paths, saver
from checkpoints.saver import CheckpointSaver
from checkpoints.tensors import DTYPES, weight_file_chunks
from checkpoints.training import Checkpoint, list_checkpoints, load_newest_checkpoint, save_checkpoint


def at(step: int) -> Checkpoint:
    """A checkpoint whose content follows from its step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {"weight": torch.rand(3, 5, generator=generator), "steps": torch.tensor(step)}
    return Checkpoint(step, tensors, {"position": step * 10, "text": "ü"})


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    """Whether two checkpoints are equal bit for bit."""
    return (
        one is not None
        and (one.step, one.state) == (other.step, other.state)
        and one.tensors.keys() == other.tensors.keys()
        and all(one.tensors[name].equal(other.tensors[name]) for name in other.tensors)
    )


def damage(url: str, name: str = "state.safetensors") -> None:
    file = open_artifact(url).file_url(name)
    content = bytearray(paths.read_bytes(file))
    content[-1] ^= 1
    paths.replace_bytes(file, bytes(content))


def test_the_newest_checkpoint_is_loaded_bit_for_bit(place: str) -> None:
    assert load_newest_checkpoint(place, "f") is None
    for step in (5, 100_000_000, 20):
        save_checkpoint(place, at(step), "f", keep_last=5)
    assert list_checkpoints(place) == ["step-00000005", "step-00000020", "step-100000000"]
    assert same(load_newest_checkpoint(place, "f"), at(100_000_000))


def test_tensors_of_all_kinds_come_back_and_the_file_is_plain_safetensors(place: str) -> None:
    tensors = {name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "slice": torch.rand(6, 4)[::2, 1:]}
    save_checkpoint(place, Checkpoint(1, tensors, {}), "f", keep_last=1)
    assert same(load_newest_checkpoint(place, "f"), Checkpoint(1, tensors, {}))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert b"".join(bytes(chunk) for chunk in weight_file_chunks(tensors)) == save(contiguous)


def test_another_configs_checkpoint_is_refused(place: str) -> None:
    save_checkpoint(place, at(1), "one", keep_last=1)
    with pytest.raises(StoreError, match="was written with other settings or data"):
        load_newest_checkpoint(place, "two")


def test_c2_planted_higher_steps_torn_folders_and_foreign_files_are_ignored(place: str) -> None:
    save_checkpoint(place, at(7), "f", keep_last=1)
    whole = open_artifact(paths.join(place, "step-00000007"))
    planted = {
        "step-00000009/state.safetensors": whole.read_bytes("state.safetensors"),
        "step-00000010/state.safetensors": b"",
        "step-00000010/.manifest.json.attempt-0123456789ab": b"{}",
        ".step-00000011.attempt-0123456789ab/manifest.json": whole.manifest.to_json(),
        "step-12/manifest.json": whole.manifest.to_json(),
        "step-00000013": b"",
        "step-latest": b"x",
        "notes.txt": b"x",
    }
    for name, content in planted.items():
        paths.replace_bytes(paths.join(place, name), content)
    assert list_checkpoints(place) == ["step-00000007"]
    assert same(load_newest_checkpoint(place, "f"), at(7))


def test_c8_retention_keeps_the_newest_and_every_nth(place: str) -> None:
    for step in range(1, 9):
        save_checkpoint(place, at(step), "f", keep_last=2, keep_every=3)
    assert list_checkpoints(place) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    for step in (3, 6, 7, 8):
        open_artifact(paths.join(place, f"step-{step:08d}")).verify()
    assert sum("attempt-" in info.url for info in paths.walk(place)) in (0, 8), "nothing of the deleted is left"


def test_c8_nothing_is_deleted_before_the_newer_one_is_committed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(place, at(1), "f", keep_last=1)

    def refuse(*_: Any) -> None:
        raise StoreError("no commit today")

    monkeypatch.setattr(checkpoints.writer.ArtifactWriter, "_create_manifest", refuse)
    monkeypatch.setattr(checkpoints.writer.ArtifactWriter, "_rename_into_place", refuse)
    with pytest.raises(StoreError, match="no commit today"):
        save_checkpoint(place, at(2), "f", keep_last=1)
    assert same(load_newest_checkpoint(place, "f"), at(1))


def test_c8_the_last_good_one_stays_when_the_newer_one_is_not_whole(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(place, at(1), "f", keep_last=1)
    commit = checkpoints.writer.ArtifactWriter.commit

    def commit_and_lose_a_file(self: Any, *arguments: Any) -> Any:
        artifact = commit(self, *arguments)
        paths.remove(artifact.file_url("state.json"))
        return artifact

    monkeypatch.setattr(checkpoints.writer.ArtifactWriter, "commit", commit_and_lose_a_file)
    save_checkpoint(place, at(2), "f", keep_last=1)
    assert list_checkpoints(place) == ["step-00000001", "step-00000002"]
    assert "old checkpoints are kept" in caplog.text


def test_c8_older_steps_never_delete_newer_ones(place: str) -> None:
    save_checkpoint(place, at(10), "f", keep_last=1)
    save_checkpoint(place, at(5), "f", keep_last=1)
    assert list_checkpoints(place) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_c11_a_damaged_newest_checkpoint_stops_the_job(place: str, name: str) -> None:
    for step in (1, 2):
        save_checkpoint(place, at(step), "f", keep_last=2)
    damage(paths.join(place, "step-00000002"), name)
    with pytest.raises(CorruptArtifactError, match=r"step-00000002 is the newest checkpoint and cannot be loaded"):
        load_newest_checkpoint(place, "f")
    assert list_checkpoints(place) == ["step-00000001", "step-00000002"]


def test_c11_never_step_0_when_all_are_damaged(place: str) -> None:
    for step in (1, 2):
        save_checkpoint(place, at(step), "f", keep_last=2)
        damage(paths.join(place, f"step-{step:08d}"))
    with pytest.raises(CorruptArtifactError, match="all 2 are damaged"):
        load_newest_checkpoint(place, "f", fallback=True)
    assert len(list_checkpoints(place)) == 2, "nothing is set aside"


def test_c11_fallback_is_loud_and_the_step_can_be_saved_again(place: str, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_checkpoint(place, at(step), "f", keep_last=3)
    damage(paths.join(place, "step-00000003"))
    paths.replace_bytes(paths.join(place, "step-00000002/manifest.json"), b"{}")
    assert same(load_newest_checkpoint(place, "f", fallback=True), at(1))
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert sum("CHECKPOINT DAMAGED" in text for text in errors) == 2
    assert sum("training goes on from step 1" in text for text in errors) == 2
    assert list_checkpoints(place) == ["step-00000001"]
    for step in (2, 3):
        save_checkpoint(place, at(step), "f", keep_last=3)
    assert same(load_newest_checkpoint(place, "f"), at(3))


def test_c15_a_second_job_with_another_state_is_told_to_stop(place: str) -> None:
    save_checkpoint(place, at(1), "f", keep_last=2)
    other = Checkpoint(1, {"weight": torch.zeros(2)}, {})
    with pytest.raises(ArtifactExistsError, match="must be written by one job"):
        save_checkpoint(place, other, "f", keep_last=2)
    assert same(load_newest_checkpoint(place, "f"), at(1))


def test_c15_a_second_job_with_the_same_state_does_no_harm(place: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        save_checkpoint(place, at(1), "f", keep_last=2)
    assert "is this job running twice?" in caplog.text
    assert same(load_newest_checkpoint(place, "f"), at(1))


class Gate:
    """Stands in for a slow store: saves wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.started: list[int] = []
        monkeypatch.setattr(saver, "save_checkpoint", self._save)

    def _save(self, url: str, checkpoint: Checkpoint, *options: Any) -> None:
        self.started.append(checkpoint.step)
        assert self.open.wait(30)
        save_checkpoint(url, checkpoint, *options)


def test_c7_tensors_and_state_may_change_right_after_save(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, checkpoint = Gate(monkeypatch), at(1)
    with CheckpointSaver(place, "f", keep_last=2) as background:
        background.save(checkpoint)
        checkpoint.tensors["weight"].zero_()
        checkpoint.state["position"] = -1
        assert load_newest_checkpoint(place, "f") is None, "the save has not finished, yet save() has returned"
        gate.open.set()
    assert same(load_newest_checkpoint(place, "f"), at(1))


def test_c7_buffers_that_were_prepared_are_used_by_the_first_save(place: str) -> None:
    with CheckpointSaver(place, "f", keep_last=2) as background:
        background.prepare(at(1).tensors)
        assert background._preparation
        background._preparation.join()
        prepared = {name: buffer.data_ptr() for name, buffer in background._buffers.items()}
        background.save(at(2))
        assert prepared == {name: buffer.data_ptr() for name, buffer in background._buffers.items()}
        assert prepared.keys() == at(2).tensors.keys()
    assert same(load_newest_checkpoint(place, "f"), at(2))


def test_c7_at_most_one_save_is_under_way(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    background = CheckpointSaver(place, "f", keep_last=3)
    background.save(at(1))
    threading.Timer(0.1, gate.open.set).start()
    background.save(at(2))
    assert gate.open.is_set(), "the second save had to wait for the first"
    background.wait()
    assert gate.started == [1, 2]
    assert same(load_newest_checkpoint(place, "f"), at(2))


def test_c7_waiting_is_told_once_however_often_saves_are_too_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    background = CheckpointSaver(str(tmp_path / "job"), "f", keep_last=3)
    for step in (1, 2, 3, 4):
        gate = Gate(monkeypatch)
        threading.Timer(0.05, gate.open.set).start()
        background.save(at(step))
    background.wait()
    assert caplog.text.count("training waits for it") == 1


@pytest.mark.parametrize("surface", ["check", "save", "wait", "with"])
def test_c7_an_error_surfaces_once_at_the_next_step(tmp_path: Path, surface: str) -> None:
    (tmp_path / "file").write_text("in the way")
    background = CheckpointSaver(str(tmp_path / "file" / "job"), "f", keep_last=1)
    background.save(at(1))
    assert background._thread
    background._thread.join()
    with pytest.raises(StoreError, match="cannot write"), contextlib.ExitStack() as stack:
        {
            "check": background.check,
            "save": lambda: background.save(at(2)),
            "wait": background.wait,
            "with": lambda: stack.enter_context(background),
        }[surface]()
    background.wait()


AT_EXIT = """
import sys, torch
from checkpoints.saver import CheckpointSaver
from checkpoints.training import Checkpoint
saver = CheckpointSaver(sys.argv[1], "f", keep_last=1)
saver.save(Checkpoint(1, {"w": torch.ones(9_000_000)}, {}))
"""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_c7_a_program_that_ends_without_wait_finishes_its_save(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "job") if kind == "folder" else request.getfixturevalue("s3")
    subprocess.run([sys.executable, "-c", AT_EXIT, url], check=True, env={**os.environ, "PYTHONPATH": "."})
    assert same(load_newest_checkpoint(url, "f"), Checkpoint(1, {"w": torch.ones(9_000_000)}, {}))


def test_c7_a_program_that_ends_without_wait_reports_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "file" / "job")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert "the checkpoint of step 1 is not saved" in done.stderr


MEMORY = """
import sys, time, torch
from checkpoints.saver import CheckpointSaver
from checkpoints.training import Checkpoint

def anonymous():
    text = open("/proc/self/smaps_rollup").read()
    return int(text.split("Anonymous:")[1].split()[0]) / 1024

tensors = {str(i): torch.ones(8 << 20, dtype=torch.uint8) for i in range(12)}
saver = CheckpointSaver(sys.argv[1], "f", keep_last=1)
before, peak = anonymous(), 0.0
for step in range(1, 3):
    saver.save(Checkpoint(step, tensors, {}))
    while saver._thread.is_alive():
        time.sleep(0.01)
        peak = max(peak, anonymous() - before)
saver.wait()
print(peak)
"""


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_c7_memory_is_bounded_by_one_copy_of_the_state(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A state of 96 MiB, saved twice: one copy, and on S3 8 parts under way that the HTTP client copies again."""
    url = str(tmp_path / "job") if kind == "folder" else request.getfixturevalue("s3")
    command = [sys.executable, "-c", MEMORY, url]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert 90 < float(done.stdout) < 96 + (60 if kind == "folder" else 330)


def test_c12_no_module_of_the_store_can_unpickle() -> None:
    folder = Path(checkpoints.__file__).parent
    for file in folder.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        forbidden = {"pickle", "torch.load", "torch.save", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
        assert not names & forbidden, f"{file.name}: {names & forbidden}"


def test_c12_loading_unpickles_nothing(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_checkpoint(place, at(1), "f", keep_last=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert same(load_newest_checkpoint(place, "f"), at(1))


def test_c12_a_pickle_in_the_place_of_tensors_is_refused(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), at(1), "f", keep_last=1)
    torch.save(at(1).tensors, tmp_path / "step-00000001" / "state.safetensors")
    with pytest.raises(CorruptArtifactError, match=r"state\.safetensors must have"):
        load_newest_checkpoint(str(tmp_path), "f")


class Job:
    """A small training job: model, optimizer, schedule, data position and random state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.position = 0

    def step(self) -> float:
        data = torch.Generator().manual_seed(self.position)
        loss = self.model(torch.rand(4, 5, generator=data)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.position += 1
        return float(loss.detach())

    def checkpoint(self) -> Checkpoint:
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{i}.{name}": value for i, state in moments.items() for name, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        return Checkpoint(self.position, tensors, {"schedule": self.schedule.state_dict(), "position": self.position})

    def restore(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            if "." in name:
                kind, _, rest = name.partition(".")
                parts[kind][rest] = tensor
        self.model.load_state_dict(parts["model"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, rest = name.partition(".")
            state.setdefault(int(index), {})[rest] = tensor
        self.schedule.load_state_dict(checkpoint.state["schedule"])
        groups = self.optimizer.state_dict()["param_groups"]
        groups[0]["lr"] = self.schedule.get_last_lr()[0]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.position = checkpoint.state["position"]
        torch.set_rng_state(checkpoint.tensors["random"])


def test_c14_resume_gives_the_next_losses_bit_for_bit(place: str) -> None:
    whole = Job()
    expected = [whole.step() for _ in range(8)]
    first = Job()
    losses = [first.step() for _ in range(5)]
    with CheckpointSaver(place, "f", keep_last=1) as background:
        background.save(first.checkpoint())
    second = Job()
    torch.manual_seed(99)
    loaded = load_newest_checkpoint(place, "f")
    assert loaded
    second.restore(loaded)
    assert losses + [second.step() for _ in range(3)] == expected
