"""Ranks of a DDP job save, load and fail together, in real processes that talk by gloo (C13, C14)."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from checkpoints import paths
from checkpoints.pieces import Part
from checkpoints.ranks import load_newest_on_all_ranks, on_rank_zero, together
from checkpoints.training import Checkpoint, load_newest_checkpoint, save_checkpoint
from tests.storage.test_pieces import ROWS, content, save_in
from tests.storage.test_training_checkpoints import at, damage, same

WORLD = 3
TIMEOUT_SECONDS = 5


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
    """Several exchanges in one world: failed and good writes, a failure of rank 1, damage, and a killed rank 0."""
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
    url, mine = f"{folder}/other-layout", Part(rank, WORLD, ROWS)
    attempt(report, "pieces", lambda: on_rank_zero(lambda: save_in(url, 7, 2), world))
    own = Checkpoint(7, mine.of(content(7).tensors), content(7).state)
    attempt(report, "part", lambda: _assert(same(load_newest_on_all_ranks(url, "f", world, part=mine), own)))
    attempt(report, "whole", lambda: _assert(same(load_newest_on_all_ranks(url, "f", world), content(7))))
    total = torch.tensor([float(rank)])
    world.all_reduce(total)
    summed = Checkpoint(4, {"weight": total.repeat(5)}, {"position": 12})
    attempt(report, "sum", lambda: on_rank_zero(lambda: save_checkpoint(f"{folder}/sum", summed, "f", 1), world))
    attempt(report, "killed", lambda: on_rank_zero(lambda: os._exit(9), world))


def hang(rank: int, folder: str, report: dict[str, Any]) -> None:
    """Rank 0 hangs in its save for longer than the timeout of the process group."""
    attempt(report, "hung", lambda: on_rank_zero(lambda: time.sleep(TIMEOUT_SECONDS + 4), torch.distributed))


def _assert(condition: bool) -> None:
    assert condition


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the reports of ranks 1 and 2; rank 0 was killed at the end."""
    folder = tmp_path_factory.mktemp("world")
    return folder, spawn(fail_and_succeed, folder, expected_failures=1)[1:]


World = tuple[Path, list[dict[str, Any]]]


def test_c13_a_failed_write_is_raised_on_all_ranks_and_nothing_is_committed(world: World) -> None:
    folder, reports = world
    for report in reports:
        assert report["none"] == report["save"] == report["load"] == report["again"] == report["harm"] == "done"
        assert report["write"].startswith("StoreError: rank 0 of 3 failed, so all stop: StoreError: cannot write")
        assert report["write_seconds"] < TIMEOUT_SECONDS
    assert paths.list_folder(str(folder / "file")) == []


def test_c13_a_failure_of_any_rank_is_raised_on_all(world: World) -> None:
    assert [report["rank_1"].split(":")[0] for report in world[1]] == ["ZeroDivisionError", "StoreError"]


def test_c13_all_ranks_load_the_same_checkpoint_or_none(world: World) -> None:
    for report in world[1]:
        assert "step-00000003 is the newest checkpoint and cannot be loaded" in report["damaged"]
        assert report["fallback"] == report["pieces"] == "done"
        assert report["part"] == report["whole"] == "done"


def test_c13_a_killed_rank_ends_the_others_in_bounded_time(world: World) -> None:
    for report in world[1]:
        assert report["killed"] != "done"
        assert report["killed_seconds"] < TIMEOUT_SECONDS + 5


def test_c14_a_checkpoint_of_three_ranks_loads_on_one(world: World) -> None:
    loaded = load_newest_checkpoint(str(world[0] / "sum"), "f")
    assert same(loaded, Checkpoint(4, {"weight": torch.full((5,), 3.0)}, {"position": 12}))


def test_c13_a_hanging_rank_ends_the_others_in_bounded_time(tmp_path: Path) -> None:
    for report in spawn(hang, tmp_path):
        assert report["hung"] != "done"
        assert report["hung_seconds"] < TIMEOUT_SECONDS + 8
