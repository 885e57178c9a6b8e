"""Ranks of a DDP job save, load and fail together, in real processes that talk by gloo (C13, C14)."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from checkpoints import paths
from checkpoints.ranks import load_newest_on_all_ranks, on_rank_zero, together
from checkpoints.training import Checkpoint, list_checkpoints, load_newest_checkpoint, save_checkpoint
from tests.storage.test_training_checkpoints import at, damage, same

WORLD = 3
TIMEOUT_SECONDS = 8


def spawn(function: Callable[..., None], folder: Path, expected_failures: int = 0) -> list[dict[str, Any]]:
    """Run `function(rank, folder, report)` in 3 processes and return what each reported."""
    context = torch.multiprocessing.get_context("spawn")
    arguments = [(rank, str(folder), function) for rank in range(WORLD)]
    processes = [context.Process(target=_rank, args=argument) for argument in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sum(process.exitcode != 0 for process in processes) == expected_failures
    files = [folder / f"report-{rank}.json" for rank in range(WORLD)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def _rank(rank: int, folder: str, function: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )
    report: dict[str, Any] = {}
    function(rank, folder, report)
    Path(folder, f"report-{rank}.json").write_text(json.dumps(report))
    os._exit(0)  # after a rank has died, gloo cannot shut down in order


def attempt(report: dict[str, Any], name: str, action: Callable[[], object]) -> None:
    """Record what an action raises, and after how long."""
    start = time.monotonic()
    try:
        action()
        report[name] = "done"
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"
    report[name + "_seconds"] = time.monotonic() - start


def fail_and_succeed(rank: int, folder: str, report: dict[str, Any]) -> None:
    """Several exchanges in one world: a failed write, a failure of rank 1, a success, a damaged checkpoint."""
    world = torch.distributed
    Path(folder, "file").touch()
    bad, good = f"{folder}/file/job", f"{folder}/job"
    attempt(report, "none", lambda: _assert(load_newest_on_all_ranks(good, "f", world) is None))
    attempt(report, "write", lambda: on_rank_zero(lambda: save_checkpoint(bad, at(1), "f", 1), world))
    attempt(report, "rank_1", lambda: together(lambda: 1 // (rank - 1), world))
    attempt(report, "save", lambda: on_rank_zero(lambda: save_checkpoint(good, at(2), "f", 2), world))
    attempt(report, "load", lambda: _assert(same(load_newest_on_all_ranks(good, "f", world), at(2))))
    attempt(report, "again", lambda: on_rank_zero(lambda: save_checkpoint(good, at(3), "f", 2), world))
    attempt(report, "harm", lambda: on_rank_zero(lambda: damage(f"{good}/step-00000003"), world))
    attempt(report, "damaged", lambda: load_newest_on_all_ranks(good, "f", world))
    attempt(report, "fallback", lambda: _assert(same(load_newest_on_all_ranks(good, "f", world, fallback=True), at(2))))


def die(rank: int, folder: str, report: dict[str, Any]) -> None:
    """Rank 0 is killed in the middle of its save."""

    def killed() -> None:
        os._exit(9)

    attempt(report, "died", lambda: on_rank_zero(killed, torch.distributed))


def hang(rank: int, folder: str, report: dict[str, Any]) -> None:
    """Rank 0 hangs in its save for longer than the timeout of the process group."""
    attempt(report, "hung", lambda: on_rank_zero(lambda: time.sleep(TIMEOUT_SECONDS + 4), torch.distributed))


def _assert(condition: bool) -> None:
    assert condition


def test_c13_a_failure_of_one_rank_is_raised_on_all_and_nothing_is_committed(tmp_path: Path) -> None:
    reports = spawn(fail_and_succeed, tmp_path)
    for rank, report in enumerate(reports):
        assert report["none"] == report["save"] == report["load"] == report["again"] == report["harm"] == "done"
        assert "cannot write" in report["write"]
        assert ("rank 0 of 3 failed, so all stop" in report["write"]) == (rank > 0)
        assert "ZeroDivisionError" in report["rank_1"]
        assert "step-00000003 is the newest checkpoint and cannot be loaded" in report["damaged"]
        assert report["fallback"] == "done"
        assert report["write_seconds"] < TIMEOUT_SECONDS
    assert paths.list_folder(str(tmp_path / "file")) == []


def test_c13_a_killed_rank_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    reports = spawn(die, tmp_path, expected_failures=1)
    for report in reports[1:]:
        assert report["died"] != "done"
        assert report["died_seconds"] < TIMEOUT_SECONDS + 4
    assert load_newest_checkpoint(str(tmp_path / "job"), "f") is None


def test_c13_a_hanging_rank_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    for report in spawn(hang, tmp_path):
        assert report["hung"] != "done"
        assert report["hung_seconds"] < TIMEOUT_SECONDS + 8


def save_in_a_world(rank: int, folder: str, report: dict[str, Any]) -> None:
    """A checkpoint of three ranks holds nothing of the ranks."""
    total = torch.tensor([float(rank)])
    torch.distributed.all_reduce(total)
    checkpoint = Checkpoint(4, {"weight": total.repeat(5)}, {"position": 12})
    on_rank_zero(lambda: save_checkpoint(f"{folder}/job", checkpoint, "f", 1), torch.distributed)


def test_c14_a_checkpoint_of_three_ranks_loads_on_one(tmp_path: Path) -> None:
    spawn(save_in_a_world, tmp_path)
    assert list_checkpoints(str(tmp_path / "job")) == ["step-00000004"]
    loaded = load_newest_checkpoint(str(tmp_path / "job"), "f")
    assert same(loaded, Checkpoint(4, {"weight": torch.full((5,), 3.0)}, {"position": 12}))
