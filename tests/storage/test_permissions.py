"""Every file that the project writes may be read by whom the umask lets, weight files too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import open_artifact, paths, write_artifact
from checkpoints.__main__ import pull
from checkpoints.training import save_checkpoint
from tests.conftest import run_every_stage, tiny_config
from tests.storage.test_artifacts import make
from tests.storage.test_training_checkpoints import at

UMASKS = (0o022, 0o027, 0o002, 0o077)
RUNS = [0o027, *(pytest.param(value, marks=pytest.mark.slow) for value in (0o022, 0o002, 0o077))]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_rights(root: Path, umask: int) -> dict[str, str]:
    """Files and folders below a folder that do not follow the umask; links have no rights of their own."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.is_symlink():
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            if path.stat().st_mode & 0o777 != expected:
                found[str(path.relative_to(root))] = oct(path.stat().st_mode)
    return found


def test_artifacts_checkpoints_copies_and_the_cache_follow_the_umask(umask: int, tmp_path: Path) -> None:
    run = tmp_path / "here" / "run"
    run.mkdir(parents=True)
    make(str(run / "expert"))
    save_checkpoint(str(run / "job"), at(1), "f", keep_last=1)
    with write_artifact(str(run / "merged"), "x", "f", resume="0123456789abcdef") as writer:
        writer.write_known("a.bin", [b"x"], 1, lambda: open_artifact(str(run / "expert")).manifest.files["tokens.bin"])
        assert wrong_rights(run, umask) == {}
    paths.replace_bytes(str(run / "metrics.jsonl"), b"{}\n")
    pull(str(run), str(tmp_path / "here" / "copy"))
    remote = make(f"memory://{tmp_path.name}{umask}/expert")
    remote.local_folder()
    assert wrong_rights(tmp_path / "here", umask) == {}
    assert wrong_rights(tmp_path / "cache", umask) == {}


def test_the_rights_of_a_file_with_a_second_name_stay(umask: int, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "blob")
    (tmp_path / "blob").chmod(0o640)
    with write_artifact(str(tmp_path / "model"), "x", "f") as writer:
        os.link(tmp_path / "blob", writer.folder / "model.safetensors")
        writer.commit()
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("umask", RUNS, indirect=True)
def test_a_whole_run_follows_the_umask(umask: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", metrics={"tensorboard": "on"})
    run_every_stage(config)
    names = [path.name for path in (tmp_path / "run").rglob("*")]
    assert {"model.safetensors", "expert.safetensors", "statistics.safetensors", "results.json"} <= {*names}
    assert wrong_rights(tmp_path, umask) == {}
