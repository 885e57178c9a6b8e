"""Artifacts appear whole or not at all, are immutable, and every damage to them is found (C2, C3, C6, C9, C10, C15)."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from checkpoints import (
    Artifact,
    ArtifactExistsError,
    CorruptArtifactError,
    Manifest,
    MissingArtifactError,
    StoreError,
    find_artifact,
    open_artifact,
    paths,
    write_artifact,
)
from checkpoints.hashing import FileHasher, describe_file
from checkpoints.parallel import in_order
from checkpoints.urls import LABEL


def make(url: str, value: int = 1) -> Artifact:
    """An artifact with a weight file of two tensors, a JSON file in a folder, and a plain file."""
    with write_artifact(url, "expert", f"fingerprint-{value}", {"seed": value}, {"data": "abc"}) as writer:
        tensors = {"first": torch.full((3, 5), float(value)), "second": torch.arange(7)}
        save_file(tensors, writer.folder / "model.safetensors")
        (writer.folder / "tokens.bin").write_bytes(bytes([value]) * 1000)
        writer.write_json("logs/facts.json", {"value": value})
        return writer.commit({"loss": value / 3})


def test_an_artifact_is_read_back_as_it_was_written(place: str) -> None:
    made = make(paths.join(place, "expert"))
    found = open_artifact(paths.join(place, "expert"))
    assert found.manifest == made.manifest
    assert found.read_json("logs/facts.json") == {"value": 1}
    assert found.local_file("tokens.bin").read_bytes() == b"\1" * 1000
    assert sorted(found.manifest.files["model.safetensors"].tensors) == ["first", "second"]
    assert {path.name for path in found.local_folder().iterdir()} >= {"model.safetensors", "tokens.bin", "logs"}
    assert found.problems() == []


def test_files_have_the_same_bytes_on_every_kind_of_storage(place: str, tmp_path: Path) -> None:
    here, there = make(str(tmp_path / "reference")), make(paths.join(place, "expert"))
    assert here.manifest.files == there.manifest.files


def test_on_a_folder_files_have_plain_names(tmp_path: Path) -> None:
    make(str(tmp_path / "run" / "backbone"))
    names = {path.name for path in (tmp_path / "run" / "backbone").iterdir()}
    assert names == {"model.safetensors", "tokens.bin", "logs", "manifest.json"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["backbone"]


def test_c2_torn_empty_and_foreign_things_are_not_artifacts(place: str) -> None:
    for name in ("torn/model.safetensors", "torn/attempt-0123456789ab/model.safetensors", ".expert.attempt-0/manifest"):
        paths.replace_bytes(paths.join(place, name), b"\0" * 10)
    paths.replace_bytes(paths.join(place, "file"), b"")
    for name in ("torn", "torn/attempt-0123456789ab", "file", "nothing"):
        assert find_artifact(paths.join(place, name)) is None
    with pytest.raises(MissingArtifactError, match=r"torn.*has no manifest\.json"):
        open_artifact(paths.join(place, "torn"))


def test_c2_nothing_is_visible_before_the_commit(place: str) -> None:
    url = paths.join(place, "expert")
    with write_artifact(url, "expert", "f") as writer:
        writer.write_chunks("weights.bin", [b"x" * 100])
        assert find_artifact(url) is None
        writer.commit()
        assert find_artifact(url) is not None


def test_c3_a_second_commit_is_told_that_it_lost(place: str) -> None:
    first = make(paths.join(place, "expert"), 1)
    with pytest.raises(ArtifactExistsError, match="another writer has committed it"):
        make(paths.join(place, "expert"), 2)
    assert open_artifact(first.url).manifest == first.manifest
    open_artifact(first.url).verify()


def test_c3_of_many_writers_at_once_exactly_one_wins(place: str) -> None:
    barrier = threading.Barrier(6)

    def compete(value: int) -> int | None:
        barrier.wait()
        try:
            make(paths.join(place, "expert"), value)
            return value
        except ArtifactExistsError:
            return None

    winners = [value for value in in_order(compete, range(1, 7), 6) if value]
    assert len(winners) == 1
    assert open_artifact(paths.join(place, "expert")).read_json("logs/facts.json") == {"value": winners[0]}


def test_c15_files_of_two_writers_never_mix(place: str) -> None:
    """Both upload before either commits, in turns: the loser must not have touched a file of the winner."""
    url = paths.join(place, "expert")
    with write_artifact(url, "expert", "1") as one, write_artifact(url, "expert", "2") as two:
        for name in ("a.bin", "b.bin"):
            one.write_chunks(name, [b"1" * 50])
            two.write_chunks(name, [b"2" * 50])
        two.commit()
        with pytest.raises(ArtifactExistsError):
            one.commit()
    found = open_artifact(url)
    assert [found.read_bytes(name) for name in ("a.bin", "b.bin")] == [b"2" * 50] * 2
    found.verify()
    assert len([info for info in paths.walk(url) if f"/{LABEL}/" not in info.url]) == 3, "the loser's files are gone"


def test_c6_an_exception_in_the_writer_publishes_nothing(place: str) -> None:
    url = paths.join(place, "expert")
    with contextlib.suppress(ZeroDivisionError), write_artifact(url, "expert", "f") as writer:
        writer.write_chunks("weights.bin", [b"x" * 100])
        writer.write_json("facts.json", {})
        raise ZeroDivisionError
    assert find_artifact(url) is None
    assert paths.list_folder(url) == []
    assert paths.list_folder(place) == []


def test_c6_an_exception_during_an_upload_aborts_it(s3: str) -> None:
    def chunks() -> Any:
        for _ in range(4):
            yield b"x" * (16 << 20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), write_artifact(f"{s3}/expert", "expert", "f") as writer:
        writer.write_chunks("weights.bin", chunks())
    assert paths.walk(s3) == []
    assert paths.store_of(s3).unfinished_uploads(s3) == []  # type: ignore[union-attr]


def test_c9_one_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    """Every byte of the small files and of the manifest, every 7th of the others, a bit each."""
    artifact = make(str(tmp_path / "expert"))
    folder = tmp_path / "expert"
    for name in [*artifact.manifest.files, "manifest.json"]:
        original = (folder / name).read_bytes()
        for position in range(0, len(original), 1 if len(original) < 300 or name == "manifest.json" else 7):
            damaged = bytearray(original)
            damaged[position] ^= 1 << (position % 8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(CorruptArtifactError, match=name):
                open_artifact(str(folder)).verify()
        (folder / name).write_bytes(original)
    open_artifact(str(folder)).verify()


def test_c9_a_flipped_bit_is_reported_with_its_tensor(place: str) -> None:
    artifact = make(paths.join(place, "expert"))
    url = artifact.file_url("model.safetensors")
    content = bytearray(paths.read_bytes(url))
    content[-1] ^= 1  # the F32 tensor `first` is stored last, behind the I64 tensor
    paths.replace_bytes(url, bytes(content))
    with pytest.raises(
        CorruptArtifactError, match=r"model\.safetensors.*damaged: tensor first, 1 of 2\).*bits flipped"
    ):
        artifact.verify()
    for read in (artifact.local_file, artifact.read_bytes):
        with pytest.raises(CorruptArtifactError, match="damaged: tensor first"):
            read("model.safetensors")


def test_c10_each_kind_of_damage_has_its_own_error(place: str) -> None:
    artifact = make(paths.join(place, "expert"))
    with write_artifact(paths.join(place, "older"), "expert", "f") as writer:
        writer.write_chunks("tokens.bin", [b"0" * 1000])
        older = writer.commit()
    url = artifact.file_url("tokens.bin")
    damages = {
        r"has 999 \(truncated\)": lambda: paths.replace_bytes(url, b"\1" * 999),
        r"has 1001 \(too long\)": lambda: paths.replace_bytes(url, b"\1" * 1001),
        r"another version \(an older one, say\) was put in its place": lambda: paths.replace_bytes(
            url, older.read_bytes("tokens.bin")
        ),
        r"tokens\.bin must be there, .* is missing": lambda: paths.remove(url),
    }
    for message, damage in damages.items():
        damage()
        with pytest.raises(CorruptArtifactError, match=message):
            artifact.verify()
    paths.replace_bytes(url, b"\1" * 1000)
    paths.replace_bytes(paths.join(artifact.url, artifact.manifest.files_in, "extra.bin"), b"?")
    with pytest.raises(CorruptArtifactError, match=r"extra\.bin must not be there"):
        artifact.verify()


def test_c10_an_older_weight_file_of_the_same_size_is_called_another_version(place: str) -> None:
    with write_artifact(paths.join(place, "both"), "expert", "f") as writer:
        save_file({"a": torch.ones(5), "b": torch.ones(3)}, writer.folder / "model.safetensors")
        artifact = writer.commit()
    paths.replace_bytes(artifact.file_url("model.safetensors"), save({"a": torch.zeros(5), "b": torch.zeros(3)}))
    with pytest.raises(CorruptArtifactError, match=r"all 2 tensors differ\); another version"):
        artifact.verify()


def test_c10_swapped_files_are_found(tmp_path: Path) -> None:
    with write_artifact(str(tmp_path / "two"), "expert", "f") as writer:
        writer.write_chunks("a.bin", [b"a" * 10])
        writer.write_chunks("b.bin", [b"b" * 10])
        artifact = writer.commit()
    shutil.move(tmp_path / "two/a.bin", tmp_path / "two/c.bin")
    shutil.move(tmp_path / "two/b.bin", tmp_path / "two/a.bin")
    shutil.move(tmp_path / "two/c.bin", tmp_path / "two/b.bin")
    with pytest.raises(CorruptArtifactError, match=r"(?s)a\.bin must have sha256.*b\.bin must have sha256"):
        artifact.verify()


def test_c10_a_file_that_is_damaged_in_the_cache_is_fetched_again(s3: str) -> None:
    artifact = make(f"{s3}/expert")
    cached = artifact.local_file("tokens.bin")
    cached.write_bytes(b"?" * 1000)
    assert artifact.local_file("tokens.bin").read_bytes() == b"\1" * 1000


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b'{"format": 1}', b"\x80", b'{"format": 99}'])
def test_a_damaged_manifest_is_an_error_and_not_an_absent_artifact(place: str, content: bytes) -> None:
    paths.replace_bytes(paths.join(place, "expert/manifest.json"), content)
    with pytest.raises(CorruptArtifactError, match=r"expert/manifest\.json"):
        find_artifact(paths.join(place, "expert"))


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "a/../../b", "manifest.json", ".."])
def test_a_manifest_cannot_name_files_outside_its_folder(name: str) -> None:
    entry = describe_file(Path(__file__))
    content = Manifest("expert", "f", files={name: entry}).to_json()
    with pytest.raises(CorruptArtifactError, match="is not a file name within"):
        Manifest.from_json(content, "x/manifest.json")


def test_a_folder_without_manifest_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds files without a manifest\.json"):
        make(str(tmp_path / "expert"))
    assert (tmp_path / "expert" / "notes.txt").read_text() == "mine"


def test_hashing_in_any_pieces_gives_the_hashes_of_the_whole(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(11, 3), "empty": torch.zeros(0, 4), "b": torch.arange(5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content, expected = (tmp_path / "x.safetensors").read_bytes(), describe_file(tmp_path / "x.safetensors")
    assert sorted(expected.tensors) == ["a", "b", "empty"]
    for length in (1, 3, 8, 9, 64, 1000):
        hasher = FileHasher("x.safetensors")
        for start in range(0, len(content), length):
            hasher.update(content[start : start + length])
        assert hasher.entry() == expected


def test_a_writer_may_fill_its_buffer_again(place: str) -> None:
    def chunks() -> Iterator[memoryview]:
        buffer = bytearray(7)
        for value in range(5):
            buffer[:] = bytes([value]) * 7
            yield memoryview(buffer)

    with write_artifact(place, "x", "f") as writer:
        writer.write_chunks("x.bin", chunks())
        artifact = writer.commit()
    assert artifact.read_bytes("x.bin") == b"".join(bytes([value]) * 7 for value in range(5))


def test_a_truncated_weight_file_cannot_be_committed(place: str) -> None:
    with write_artifact(place, "x", "f") as writer:
        save_file({"a": torch.rand(100)}, writer.folder / "x.safetensors")
        content = (writer.folder / "x.safetensors").read_bytes()
        (writer.folder / "x.safetensors").write_bytes(content[:-1])
        with pytest.raises(CorruptArtifactError, match="whole weight file"):
            writer.commit()
    assert find_artifact(place) is None


def test_the_manifest_is_json_that_people_can_read(place: str) -> None:
    artifact = make(paths.join(place, "expert"))
    values = json.loads(paths.read_bytes(paths.join(artifact.url, "manifest.json")))
    assert values["kind"] == "expert"
    assert values["facts"] == {"loss": 1 / 3}
    assert values["files"]["tokens.bin"]["size"] == 1000
