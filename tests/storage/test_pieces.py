"""Training checkpoints in pieces: when they exist, who reads what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import CorruptArtifactError, MissingArtifactError, paths
from checkpoints.artifact import examine, newest_checkpoints
from checkpoints.pieces import PIECES_NAME, Part
from checkpoints.training import (
    Checkpoint,
    commit_pieces,
    forget_unfinished,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
    save_piece,
)
from tests.storage.test_training_checkpoints import at, damage, same

ROWS = {"weight": 3, "long": 7}


def content(step: int) -> Checkpoint:
    """A checkpoint with two tensors that are cut, one of fewer rows than four pieces, and one that is not."""
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(step, {**at(step).tensors, "long": torch.rand(7, 2, generator=generator)}, at(step).state)


def save_in(place: str, step: int, count: int, keep_last: int = 5, commits: bool = True) -> None:
    whole = content(step)
    for index in range(count):
        part = Part(index, count, ROWS)
        save_piece(place, Checkpoint(step, part.of(whole.tensors), {}), "f", part)
    if commits:
        commit_pieces(place, whole, "f", Part(0, count, ROWS), keep_last)


@pytest.mark.parametrize("written", [None, 1, 2, 4])
@pytest.mark.parametrize("read", [None, 1, 3, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(written: int | None, read: int | None, place: str) -> None:
    if written is None:
        save_checkpoint(place, content(7), "f", keep_last=1)
    else:
        save_in(place, 7, written)
    if read is None:
        assert same(load_newest_checkpoint(place, "f"), content(7))
        return
    for index in range(read):
        part = Part(index, read, ROWS)
        own = Checkpoint(7, part.of(content(7).tensors), content(7).state)
        assert same(load_newest_checkpoint(place, "f", part=part), own)


def test_parts_are_cut_as_torch_cuts_them() -> None:
    for rows, count in ((7, 3), (3, 4), (8, 2), (1, 5)):
        tensor = torch.arange(rows)
        cut = [Part(index, count, {"x": rows}).of({"x": tensor})["x"] for index in range(count)]
        assert [piece.tolist() for piece in cut if len(piece)] == [piece.tolist() for piece in tensor.chunk(count)]


def test_a_step_exists_when_all_its_pieces_do_and_what_was_not_committed_is_forgotten(place: str) -> None:
    save_in(place, 3, 2)
    save_in(place, 5, 2, commits=False)
    assert list_checkpoints(place) == ["step-00000003"]
    assert same(load_newest_checkpoint(place, "f"), content(3))
    for index in range(2):
        save_piece(place, Checkpoint(6, {}, {}), "f", Part(index, 4, ROWS))
    with pytest.raises(MissingArtifactError, match="3-of-4"):
        commit_pieces(place, content(6), "f", Part(0, 4, ROWS), 5)
    forget_unfinished(place)
    assert [name for name in paths.list_folder(place) if name.startswith("pieces")] == ["pieces-00000003"]
    save_in(place, 5, 3)
    assert same(load_newest_checkpoint(place, "f"), content(5))


def test_pieces_go_with_their_step(place: str) -> None:
    for step in (1, 2, 3, 4):
        save_in(place, step, 2, keep_last=2)
    names = [f"{kind}-{step:08d}" for kind in ("pieces", "step") for step in (3, 4)]
    assert paths.list_folder(place) == names
    found = newest_checkpoints(examine(place)[0], place)
    assert [paths.relative(artifact.url, place) for artifact in found] == [
        "pieces-00000004/1-of-2",
        "pieces-00000004/2-of-2",
        "step-00000004",
    ]


def test_a_changed_byte_in_a_piece_is_found_by_whoever_reads_it(place: str) -> None:
    save_in(place, 1, 2)
    save_in(place, 2, 2)
    damage(paths.join(place, "pieces-00000002", "2-of-2"))
    assert load_newest_checkpoint(place, "f", part=Part(0, 2, ROWS)) is not None
    for part in (None, Part(1, 2, ROWS)):
        with pytest.raises(CorruptArtifactError, match="2-of-2"):
            load_newest_checkpoint(place, "f", part=part)
    assert same(load_newest_checkpoint(place, "f", fallback=True), content(1))


@pytest.mark.parametrize("wrong", [[], {}, {"count": 2}, {"count": "2", "rows": {}, "sha256": ["a", "b"]},
                                   {"count": 2, "rows": {"weight": "3"}, "sha256": ["a", "b"]},
                                   {"count": 2, "rows": {"weight": 3}, "sha256": ["a", "b"]}],
                         ids=["list", "empty", "count", "text", "rows", "others"])  # fmt: skip
def test_a_step_that_does_not_describe_its_pieces_is_refused(wrong: Any, tmp_path: Path) -> None:
    url = str(tmp_path)
    save_in(url, 1, 2)
    from checkpoints.manifest import CHECKPOINT_KIND
    from checkpoints.writer import write_artifact

    paths.remove(paths.join(url, "step-00000001"))
    with write_artifact(paths.join(url, "step-00000001"), CHECKPOINT_KIND, "f") as writer:
        (writer.folder / PIECES_NAME).write_text(json.dumps(wrong))
        writer.write_json("state.json", {})
        writer.commit({"step": 1})
    with pytest.raises(CorruptArtifactError, match=r"must (say of how many pieces it is|be a piece of)"):
        load_newest_checkpoint(url, "f")
