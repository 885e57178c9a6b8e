"""An artifact that takes another one's place: whoever looks meanwhile finds the old one or the new one, whole."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from pathlib import Path

import pytest

from checkpoints import Artifact, ArtifactExistsError, find_artifact, folder, open_artifact, paths, write_artifact

EXCHANGES = 150


def write(url: str, text: str, old: Artifact | None = None, resume: str = "") -> Artifact:
    with write_artifact(url, "test", "f" * 32, resume=resume) as writer:
        writer.write_json("a.json", text)
        writer.write_json("deep/b.json", text * 100)
        return writer.commit({"text": text}, old=old)


def look(url: Path) -> str:
    """The text of the artifact that is there, after its files were read from the very folder that was opened.

    An empty text where that folder was deleted while we read, because a newer one took its place.
    """
    descriptor = os.open(url, os.O_RDONLY | os.O_DIRECTORY)  # fails when there is none
    try:
        manifest = json.loads(_read("manifest.json", descriptor))
        for name, entry in manifest["files"].items():
            assert hashlib.sha256(_read(name, descriptor)).hexdigest() == entry["sha256"]
        return str(manifest["facts"]["text"])
    except FileNotFoundError:
        assert os.fstat(descriptor).st_ino != os.stat(url).st_ino, "the folder that stands there is whole"
        return ""
    finally:
        os.close(descriptor)


def _read(name: str, folder: int) -> bytes:
    with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


def test_a_reader_finds_a_whole_artifact_at_every_moment(tmp_path: Path) -> None:
    url, seen, failures = tmp_path / "model", set(), []
    artifact, done = write(str(url), "0"), threading.Event()

    def poll() -> None:
        while not done.is_set():
            try:
                seen.add(look(url))
                assert find_artifact(str(url)) is not None
            except Exception as error:
                failures.append(repr(error))

    readers = [threading.Thread(target=poll) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(1, EXCHANGES):
        artifact = write(str(url), str(number), artifact, resume="ab" * 16)
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(seen) > 10
    assert open_artifact(str(url)).manifest.facts == {"text": str(EXCHANGES - 1)}
    assert open_artifact(str(url)).problems() == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing old stays behind"


def test_without_an_exchange_of_the_system_it_takes_two_steps_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(folder, "_exchanged", lambda *_: False)
    url = str(tmp_path / "model")
    write(url, "new", write(url, "old"))
    assert open_artifact(url).manifest.facts == {"text": "new"}
    assert open_artifact(url).problems() == []
    assert "is replaced in two steps" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_on_an_object_store_the_manifest_is_the_exchange() -> None:
    url = f"memory://exchange-{uuid.uuid4().hex}/model"
    old = write(url, "old")
    new = write(url, "new", old)
    assert open_artifact(url).read_json("a.json") == "new"
    assert open_artifact(url).problems() == []
    names = [info.url for info in paths.walk(url)]
    assert len(names) == 3
    assert all(new.manifest.attempt in name or name.endswith("manifest.json") for name in names)


@pytest.mark.parametrize("place", ["folder", "object store"])
def test_what_somebody_else_has_replaced_meanwhile_stays(tmp_path: Path, place: str) -> None:
    url = str(tmp_path / "model") if place == "folder" else f"memory://exchange-{uuid.uuid4().hex}/model"
    old = write(url, "old")
    write(url, "theirs", old)
    with pytest.raises(ArtifactExistsError):
        write(url, "ours", old)
    assert open_artifact(url).read_json("a.json") == "theirs"
    assert open_artifact(url).problems() == []


def test_an_exchange_that_fails_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "model")
    old = write(url, "old")

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "_exchanged", refuse)
    with pytest.raises(Exception, match="cannot replace"):
        write(url, "new", old)
    assert open_artifact(url).read_json("a.json") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
