"""Artifacts that somebody else wrote: nothing leaves its folder, nothing is taken for what it is not, nothing hangs."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from checkpoints import (
    Artifact,
    CorruptArtifactError,
    Manifest,
    StoreError,
    UserError,
    find_artifact,
    open_artifact,
    paths,
    write_artifact,
)
from checkpoints.__main__ import list_command, pull, push, verify
from checkpoints.journal import Journal
from checkpoints.manifest import NO_HASH
from checkpoints.training import load_checkpoint, save_checkpoint
from tests.mutation import FUZZ_INPUTS, VALUES, texts, values
from tests.storage.test_artifacts import make
from tests.storage.test_training_checkpoints import at

HOSTILE_NAMES = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../../x", "a/./x", "a//x", "a/", "a\n/../../../escaped", "a\nb",
    "a\x00b", "a\\..\\x", "C:\\x", "C:x", "\ud83d", "x\u2028y", "x\x1b[31m", "nul", "com1.txt", "x.", "x ", "a" * 300,
    "manifest.json", "manifest.json/x", ".journal.json", ".owner.json", "a/.x.attempt-0123456789ab/y",
]  # fmt: skip


def signed(content: dict[str, Any]) -> bytes:
    """A manifest with the hash of its own bytes, as an attacker would make it."""
    text = (json.dumps({**content, "sha256": NO_HASH}, indent=1, sort_keys=True) + "\n").encode()
    return text.replace(f' "sha256": "{NO_HASH}"'.encode(), f' "sha256": "{hashlib.sha256(text).hexdigest()}"'.encode())


def change(artifact: Artifact, **changes: Any) -> None:
    """Put other values into the manifest of an artifact."""
    url = paths.join(artifact.url, "manifest.json")
    paths.replace_bytes(url, signed({**json.loads(paths.read_bytes(url)), **changes}))


def everything(root: Path) -> dict[str, bytes]:
    """All files of a test's folder, to tell whether one was written or changed outside of its place."""
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.is_symlink()}


def ending(action: Callable[[], object]) -> str:
    """Run a command in this process: its error's message, or an empty string; anything but a domain error is raised."""
    try:
        action()
    except UserError as error:
        return str(error)
    except typer.Exit:
        return ""
    return ""


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_file_name_leads_out_of_the_artifact(name: str, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}{abs(hash(name))}/run/expert"
    artifact = make(url)
    entry = json.loads(paths.read_bytes(f"{url}/manifest.json"))["files"]["tokens.bin"]
    change(artifact, files={name: entry})
    with pytest.raises(CorruptArtifactError, match=r"expert/manifest\.json must be an undamaged manifest"):
        open_artifact(url)
    pull(url, str(tmp_path / "a" / "b" / "target")) if find(url) else None
    assert everything(tmp_path) == {}
    with write_artifact(str(tmp_path / "mine"), "x", "f") as writer, pytest.raises((StoreError, ValueError)):
        writer.write_chunks(name, [b"x"])
    assert everything(tmp_path) == {}


def find(url: str) -> Artifact | None:
    try:
        return find_artifact(url)
    except CorruptArtifactError:
        return None


@pytest.mark.parametrize(
    "attempt",
    ["", "/", "/elsewhere", "../../..", "..", "attempt-0123456789ab/../..", "attempt-0123456789AB", "attempt-x\n", 3],
)
def test_no_attempt_leads_out_of_the_cache(attempt: Any, tmp_path: Path) -> None:
    artifact = make(f"memory://{tmp_path.name}{abs(hash(attempt))}/expert")
    change(artifact, attempt=attempt, files_in=artifact.manifest.files_in)
    with pytest.raises(CorruptArtifactError, match="attempt must be a name such as"):
        open_artifact(artifact.url)
    change(artifact, attempt=attempt, files_in=attempt)
    with pytest.raises(CorruptArtifactError, match="attempt must be a name such as"):
        open_artifact(artifact.url)


def test_the_cache_of_one_artifact_takes_no_files_of_another(tmp_path: Path) -> None:
    """An attacker names the attempt of somebody else's artifact, which is no secret."""
    root = f"memory://{tmp_path.name}"
    mine = make(f"{root}/mine", 1)
    with write_artifact(f"{root}/theirs", "expert", "f") as writer:
        writer.attempt = mine.manifest.attempt
        writer._files_url = paths.join(writer.url, writer.attempt)
        writer.write_chunks("tokens.bin", [b"theirs"])
        writer.write_chunks("more.bin", [b"theirs"])
        theirs = writer.commit()
    before = mine.local_folder()
    theirs.local_folder()
    assert (before / "tokens.bin").read_bytes() == b"\1" * 1000
    assert not (before / "more.bin").exists()


def test_a_file_that_is_also_a_folder_is_told(place: str) -> None:
    artifact = make(paths.join(place, "expert"))
    entry = json.loads(paths.read_bytes(f"{artifact.url}/manifest.json"))["files"]["tokens.bin"]
    change(artifact, files={"logs": entry, "logs/a.bin": entry})
    with pytest.raises(CorruptArtifactError, match=r"'logs' cannot be a file and, for 'logs/a\.bin', a folder"):
        open_artifact(artifact.url)


def test_keys_of_a_bucket_lead_nowhere_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"memory://{tmp_path.name}/run"
    artifact = make(f"{root}/backbone")
    for name in ("../../../esc/manifest.json", "a\n/../../../esc/manifest.json", "a//manifest.json"):
        paths.replace_bytes(f"{root}/{name}", paths.read_bytes(f"{artifact.url}/manifest.json"))
    for name in ("../../../x.log", "logs/\n.log", "logs\\x.log", "good.log"):
        paths.replace_bytes(f"{root}/{name}", b"x")
    target = tmp_path / "a" / "b" / "c" / "d"
    with pytest.raises(typer.Exit) as ended:
        pull(root, str(target))
    assert ended.value.exit_code == 1
    said = capsys.readouterr().out
    assert said.count("must have a plain name") == 5, "what is behind .. counts as hidden"
    assert "1 copied" in said
    assert {Path(name).relative_to(target).parts[0] for name in everything(tmp_path)} == {"backbone", "good.log"}
    assert "must have a plain name" in ending(lambda: list_command(root))


WRONG_FORMS: dict[str, list[Any]] = {
    "kind": [None, 3, [], {}, "", "a\nb", "x" * 5000],
    "fingerprint": [None, 3, [], "", "\x1b[31m"],
    "attempt": [None, 3, [], {}],
    "files_in": [None, 3, "elsewhere", ".."],
    "created": [None, 3, "", "yesterday", "2001-99-99T00:00:00+00:00", "2001-01-01", "0000-00-00T00:00:00+00:00"],
    "settings": [None, [], 3, "x"],
    "inputs": [None, [], {"data": 3}, {"data": None}],
    "facts": [None, [], 3, "x"],
    "files": [None, [], 3, {"a": None}, {"a": []}, {"a": {}}, {"a": {"size": 1}}, {"a": 3}],
    "format": [None, True, 1.0, "1", 3],
    "extra": [1],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, value) for name, found in WRONG_FORMS.items() for value in found])
def test_a_wrong_form_is_a_sentence_in_every_command(name: str, wrong: Any, tmp_path: Path) -> None:
    artifact = make(str(tmp_path / "run" / "expert"))
    change(artifact, **{name: wrong})
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json must") as told:
        open_artifact(artifact.url)
    assert len(str(told.value)) < 600
    assert "manifest.json" in ending(lambda: list_command(str(tmp_path / "run")))


@pytest.mark.parametrize(
    "entry",
    [
        {"size": -1}, {"size": True}, {"size": 1.0}, {"size": "1"}, {"size": 2**63}, {"size": 10**30}, {"sha256": None},
        {"sha256": "x"}, {"sha256": "A" * 64}, {"sha256": "../" + "0" * 61}, {"tensors": []}, {"tensors": {"a": 3}},
        {"tensors": {"a": "x"}}, {"tensors": None}, {"more": 1},
    ],
)  # fmt: skip
def test_sizes_and_hashes_are_checked(entry: dict[str, Any], tmp_path: Path) -> None:
    artifact = make(str(tmp_path / "expert"))
    good = json.loads((tmp_path / "expert/manifest.json").read_bytes())["files"]["tokens.bin"]
    change(artifact, files={"tokens.bin": {**good, **entry}})
    with pytest.raises(CorruptArtifactError, match=r"tokens\.bin"):
        open_artifact(artifact.url)


@pytest.mark.parametrize("step", [None, "1", 1.0, True, -1, [], 10**30])
def test_a_checkpoint_has_a_step(step: Any, tmp_path: Path) -> None:
    url = str(tmp_path / "run" / "job")
    save_checkpoint(url, at(1), "f", keep_last=1)
    artifact = open_artifact(f"{url}/step-00000001")
    change(artifact, facts={"step": step} if step is not None else {})
    with pytest.raises(CorruptArtifactError, match=r"facts\.step must be a number of steps"):
        load_checkpoint(artifact.url, "f")
    with pytest.raises(typer.Exit) as ended:
        verify(str(tmp_path / "run"))
    assert ended.value.exit_code == 1


def test_an_artifact_from_the_future_is_of_age_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(make(str(tmp_path / "run" / "expert")), created="9999-12-31T23:59:59+00:00")
    list_command(str(tmp_path / "run"), as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["age_seconds"] == 0


def test_a_huge_size_is_compared_and_not_read(tmp_path: Path) -> None:
    artifact = make(str(tmp_path / "run" / "expert"))
    good = json.loads((tmp_path / "run/expert/manifest.json").read_bytes())["files"]
    change(artifact, files={**good, "tokens.bin": {**good["tokens.bin"], "size": 2**63 - 1}})
    (problem,) = open_artifact(artifact.url).problems()
    assert "truncated" in problem
    with pytest.raises(typer.Exit):
        pull(str(tmp_path / "run"), str(tmp_path / "copy"))


def links(tmp_path: Path) -> Iterator[tuple[Artifact, Path]]:
    (tmp_path / "secret.log").write_bytes(b"\1" * 1000)
    artifact = make(str(tmp_path / "run" / "expert"))
    place = Path(artifact.url) / "tokens.bin"
    for target in (tmp_path / "secret.log", Path("../../secret.log"), Path("/proc/self/mem"), Path("tokens.bin")):
        place.unlink()
        place.symlink_to(target)
        yield artifact, place


def test_a_link_inside_an_artifact_is_not_followed_out_of_it(tmp_path: Path) -> None:
    for artifact, place in links(tmp_path):
        assert [str(place) in problem and "link" in problem for problem in artifact.problems()] == [True]
        for read in (artifact.local_file, artifact.read_bytes, artifact.file_url):
            if read != artifact.file_url or os.readlink(place) != "tokens.bin":
                with pytest.raises(CorruptArtifactError, match="link"):
                    read("tokens.bin")
        with pytest.raises(typer.Exit):
            pull(str(tmp_path / "run"), str(tmp_path / "copy"))
        assert not (tmp_path / "copy" / "expert").exists()


def test_a_linked_folder_inside_an_artifact_is_not_followed_out_of_it(tmp_path: Path) -> None:
    artifact = make(str(tmp_path / "expert"))
    (tmp_path / "expert" / "logs").rename(tmp_path / "elsewhere")
    (tmp_path / "expert" / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifactError, match="passes a link to"):
        artifact.read_json("logs/facts.json")


def test_a_linked_manifest_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "manifest.json").symlink_to("/etc/hostname")
    with pytest.raises(CorruptArtifactError, match="passes a link to"):
        find_artifact(str(tmp_path / "expert"))


def test_a_run_or_an_artifact_may_be_a_link_itself_and_links_within_it_are_followed(tmp_path: Path) -> None:
    make(str(tmp_path / "disk" / "expert"))
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "expert").symlink_to(tmp_path / "disk" / "expert")
    inside = tmp_path / "disk" / "expert" / "tokens.bin"
    inside.rename(inside.with_name("bytes"))
    inside.symlink_to("bytes")
    for url in (tmp_path / "run" / "expert", tmp_path / "other" / "expert"):
        assert open_artifact(str(url)).local_file("tokens.bin").read_bytes() == b"\1" * 1000
    (tmp_path / "disk" / "x.log").write_text("x")
    (tmp_path / "disk" / "y.log").symlink_to("x.log")
    pull(str(tmp_path / "run"), str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "y.log").read_text() == "x"


def test_loose_links_and_pipes_are_said_to_be_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(str(tmp_path / "run" / "expert"))
    (tmp_path / "run" / "a.log").write_text("a")
    (tmp_path / "run" / "x.log").symlink_to("/etc/hostname")
    (tmp_path / "run" / "y.log").symlink_to("nowhere")
    (tmp_path / "run" / "z.log").symlink_to("z.log")
    (tmp_path / "run" / "folder").symlink_to("/etc")
    os.mkfifo(tmp_path / "run" / "pipe.log")
    target = f"memory://{tmp_path.name}/run"
    push(str(tmp_path / "run"), target)
    said = capsys.readouterr().out
    assert said.count("passed over: ") == 5
    assert all(name in said for name in ("x.log", "y.log", "z.log", "pipe.log", "folder"))
    assert "1 copied" in said
    assert [info.url for info in paths.walk(target) if info.url.endswith(".log")] == [f"{target}/a.log"]


def test_what_is_in_the_way_of_a_copy_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a bucket `a` and `a/b` are two keys; a folder holds one of them."""
    root = f"memory://{tmp_path.name}/run"
    for name in ("experts/expert-0", "a.log/inner", "last"):
        make(f"{root}/{name}")
    for name in ("a.log", "b.log"):
        paths.replace_bytes(f"{root}/{name}", b"x")
    target = tmp_path / "target"
    target.mkdir()
    (target / "experts").write_bytes(b"mine")
    with pytest.raises(typer.Exit) as ended:
        pull(root, str(target))
    assert ended.value.exit_code == 1
    said = capsys.readouterr().out
    assert f"{target}/experts/expert-0 must be free for {root}/experts/expert-0, but a file stands" in said
    assert f"passed over: cannot write {target}/a.log" in said
    assert {"last", "a.log", "b.log", "experts"} == {path.name for path in target.iterdir()}
    assert (target / "experts").read_bytes() == b"mine"


@pytest.mark.timeout(60)
def test_pipes_sockets_and_devices_are_refused_and_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make(str(tmp_path / "run" / "expert"))
    specials = [tmp_path / "pipe", Path("/dev/zero"), tmp_path / "socket"]
    os.mkfifo(specials[0])
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # sockets allow only short paths
        server.bind("socket")
    for special in specials:
        for read in (paths.read_bytes, paths.file_size, paths.exists, paths.filesystem):
            with pytest.raises(CorruptArtifactError, match=r"must be a file, but is a"):
                read(str(special))
    place = Path(artifact.url) / "tokens.bin"
    place.unlink()
    os.mkfifo(place)
    (problem,) = artifact.problems()
    assert "is a named pipe" in problem
    with pytest.raises(CorruptArtifactError, match="named pipe"):
        artifact.local_file("tokens.bin", verify=False)
    (Path(artifact.url) / "manifest.json").unlink()
    os.mkfifo(Path(artifact.url) / "manifest.json")
    assert "named pipe" in ending(lambda: list_command(str(tmp_path / "run")))
    with pytest.raises(CorruptArtifactError, match="named pipe"):
        find_artifact(artifact.url)


def test_a_link_put_into_a_writers_folder_is_not_committed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with write_artifact(str(tmp_path / "expert"), "expert", "f") as writer:
        (writer.folder / "model.bin").symlink_to(tmp_path / "secret")
        with pytest.raises(CorruptArtifactError, match="passes a link to"):
            writer.commit()


def test_hostile_bytes_of_manifests_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make(str(tmp_path / "run" / "expert"))
    path = Path(artifact.url) / "manifest.json"
    for content in texts([path.read_bytes()]):
        path.write_bytes(content)
        ending(lambda: list_command(str(tmp_path / "run")))
        ending(lambda: verify(str(tmp_path / "run")))
        capsys.readouterr()


def manifest_values(url: str) -> Any:
    return json.loads(paths.read_bytes(f"{url}/manifest.json"))


def test_hostile_values_of_manifests_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signed again, so that they get past the manifest's own hash; nothing is written outside of the target."""
    run, target = tmp_path / "run", tmp_path / "deep" / "down" / "target"
    save_checkpoint(str(run / "job"), at(1), "f", keep_last=1)
    artifact = make(str(run / "expert"))
    others = everything(tmp_path)
    for url in (artifact.url, str(run / "job" / "step-00000001")):
        good, path = manifest_values(url), Path(url) / "manifest.json"
        original, taken = path.read_bytes(), 0
        for number, value in enumerate(values(good, FUZZ_INPUTS)):
            try:
                path.write_bytes(signed(value) if isinstance(value, dict) else json.dumps(value).encode())
            except (ValueError, TypeError):  # not JSON at all
                continue
            taken += find(url) is not None
            ending(lambda: list_command(str(run)))
            if number % 5 == 0:
                ending(lambda: verify(str(run), as_json=True))
                ending(lambda: pull(str(run), str(target)))
                ending(lambda: pull(str(run), str(target / "newest"), newest=True))
            capsys.readouterr()
        path.write_bytes(original)
        assert taken > FUZZ_INPUTS // 50
    found = {name: content for name, content in everything(tmp_path).items() if not name.startswith(str(target))}
    assert found == others


def test_a_manifest_is_parsed_or_refused_whatever_its_values(tmp_path: Path) -> None:
    """Every place in a manifest with every hostile value."""
    good = manifest_values(make(str(tmp_path / "expert")).url)
    for name in good:
        for value in VALUES:
            ending(partial(Manifest.from_json, signed({**good, name: value}), "x/manifest.json"))
    for name, entry in good["files"].items():
        for key in entry:
            for value in VALUES:
                files = {**good["files"], name: {**entry, key: value}}
                ending(partial(Manifest.from_json, signed({**good, "files": files}), "x/manifest.json"))


def test_a_hostile_journal_is_no_journal(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / ".journal.json"))
    (tmp_path / "a.bin").write_bytes(b"abc")
    with write_artifact(str(tmp_path / "x"), "x", "f") as writer:
        entry = writer.write_chunks("a.bin", [b"abc"])
    journal.add("a.bin", entry)
    whole = (tmp_path / ".journal.json").read_bytes()
    assert list(Journal(str(tmp_path / ".journal.json")).read(str(tmp_path))) == ["a.bin"]
    for content in [*texts([whole]), *(json.dumps(value).encode() for value in values(json.loads(whole)))]:
        (tmp_path / ".journal.json").write_bytes(content)
        assert set(Journal(str(tmp_path / ".journal.json")).read(str(tmp_path))) <= {"a.bin"}
