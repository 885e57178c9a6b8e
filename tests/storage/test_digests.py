"""Artifacts that are hashed with BLAKE3: their manifest says so, and whoever reads them checks them by it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from checkpoints import Artifact, CorruptArtifactError, StoreError, open_artifact, paths, plain_folder, write_artifact
from checkpoints.copying import copy_artifact
from checkpoints.hashing import describe_file
from checkpoints.journal import Journal
from checkpoints.safetensors import read_spans
from checkpoints.training import Checkpoint, load_checkpoint, save_checkpoint
from modularforge.assembly.plan import output_tensors, plan_merge
from modularforge.assembly.stream import execute
from modularforge.assembly.values import values_of
from modularforge.errors import MismatchError
from modularforge.stored_models import MappedWeights
from tests.storage.test_hostile_artifacts import change

TENSORS = {"a": torch.arange(600.0).reshape(30, 20), "b": torch.ones(7)}


@pytest.fixture
def blake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("MODULARFORGE_HASH", "blake3")
    return monkeypatch


def weights(url: str) -> Artifact:
    with write_artifact(url, "expert", "f") as writer:
        save_file(TENSORS, writer.folder / "x.safetensors")
        writer.write_chunks("tokens.bin", [b"\1" * 5000])
        return writer.commit({"loss": 0.5})


def test_the_manifest_names_the_algorithm(place: str, blake: pytest.MonkeyPatch) -> None:
    artifact = weights(place)
    values = json.loads(paths.read_bytes(paths.join(place, "manifest.json")))
    assert values["format"] == 2
    content = artifact.read_bytes("x.safetensors")
    assert values["files"]["tokens.bin"] == {
        "size": 5000, "blake3": blake3(b"\1" * 5000).hexdigest(), "tensors": {},
    }  # fmt: skip
    assert values["files"]["x.safetensors"]["blake3"] == blake3(content).hexdigest()
    tensor = blake3(TENSORS["a"].numpy().tobytes()).hexdigest()
    assert values["files"]["x.safetensors"]["tensors"]["a"] == tensor
    blake.delenv("MODULARFORGE_HASH")
    again = open_artifact(place)
    assert again.manifest == artifact.manifest
    again.verify()
    assert again.local_file("tokens.bin").read_bytes() == b"\1" * 5000


def test_sha256_is_what_it_was(place: str) -> None:
    values = json.loads(weights(place).manifest.to_json())
    assert values["format"] == 1
    assert values["files"]["tokens.bin"]["sha256"] == hashlib.sha256(b"\1" * 5000).hexdigest()


def test_a_bit_that_flips_is_found_by_it(tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    artifact = weights(str(tmp_path / "expert"))
    blake.delenv("MODULARFORGE_HASH")
    path = tmp_path / "expert/x.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    told = artifact.problem_of("x.safetensors")
    assert "must have blake3 " in told
    assert "damaged: tensor b, 1 of 2" in told
    spans = read_spans(str(path), artifact.entry("x.safetensors").tensors)
    assert values_of(spans["a"])[5] == 5
    with pytest.raises(MismatchError, match="must have the hash"):
        values_of(spans["b"])
    assert MappedWeights(artifact)("a").equal(TENSORS["a"])
    with pytest.raises(CorruptArtifactError, match="must have the hash"):
        MappedWeights(artifact)("b")


def test_a_copy_keeps_the_digests_it_was_made_with(tmp_path: Path, s3: str, blake: pytest.MonkeyPatch) -> None:
    artifact = weights(str(tmp_path / "expert"))
    blake.delenv("MODULARFORGE_HASH")
    assert copy_artifact(artifact, f"{s3}/there", lambda size: None)
    assert copy_artifact(open_artifact(f"{s3}/there"), str(tmp_path / "back"), lambda size: None)
    back = open_artifact(str(tmp_path / "back"))
    assert back.manifest.files == artifact.manifest.files
    assert back.manifest.format == 2
    back.verify()
    assert open_artifact(f"{s3}/there").local_file("tokens.bin").read_bytes() == b"\1" * 5000


@pytest.mark.parametrize(("before", "after"), [("sha256", "blake3"), ("blake3", "sha256"), ("blake3", "blake3")])
def test_a_model_has_digests_of_one_kind_whatever_its_parts_have(
    before: str, after: str, tmp_path: Path, blake: pytest.MonkeyPatch
) -> None:
    blake.setenv("MODULARFORGE_HASH", before)
    part = weights(str(tmp_path / "expert"))
    spans = read_spans(part.file_url("x.safetensors"), part.entry("x.safetensors").tensors)
    tensors = {**output_tensors({"a": spans["a"]}), **output_tensors({"b": spans["b"]}, "F16")}
    blake.setenv("MODULARFORGE_HASH", after)
    (tmp_path / "out").mkdir()
    writer = plain_folder(tmp_path / "out")
    execute(plan_merge(tensors, 10**9), writer)
    ((name, entry),) = writer.written.items()
    assert entry == describe_file(tmp_path / "out" / name)
    assert entry.algorithm == after


def test_a_checkpoint_is_resumed_whatever_is_chosen(tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "job")
    save_checkpoint(url, Checkpoint(1, TENSORS, {}), "f", keep_last=2)
    blake.setenv("MODULARFORGE_HASH", "sha256")
    save_checkpoint(url, Checkpoint(2, TENSORS, {}), "f", keep_last=2)
    formats = [open_artifact(f"{url}/step-0000000{step}").manifest.format for step in (1, 2)]
    assert formats == [2, 1]
    found = load_checkpoint(f"{url}/step-00000001", "f")
    assert found.tensors["a"].equal(TENSORS["a"])


def test_a_journal_keeps_them(tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    entry = describe_file(tmp_path / "x.safetensors")
    Journal(str(tmp_path / ".journal.json")).add("x.safetensors", entry)
    assert Journal(str(tmp_path / ".journal.json")).read(str(tmp_path)) == {"x.safetensors": entry}


@pytest.mark.parametrize(
    "entry", [{"blake3": "x"}, {"sha256": "1" * 64}, {"tensors": {"a": "blake3:" + "1" * 64}}, {"more": 1}]
)
def test_both_kinds_of_a_digest_are_checked(entry: dict[str, Any], tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    artifact = weights(str(tmp_path / "expert"))
    good = json.loads((tmp_path / "expert/manifest.json").read_bytes())["files"]["tokens.bin"]
    change(artifact, files={"tokens.bin": {**good, **entry}})
    with pytest.raises(CorruptArtifactError, match=r"tokens\.bin"):
        open_artifact(artifact.url)


def test_without_the_package_a_sentence_names_the_extra(tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    artifact = weights(str(tmp_path / "expert"))
    blake.setitem(sys.modules, "blake3", None)
    for action in (artifact.verify, lambda: weights(str(tmp_path / "other"))):
        with pytest.raises(StoreError, match=r"blake3 must be installed .* \(pip install 'modularforge\[blake3\]'"):
            action()
    assert not (tmp_path / "other").exists()


def test_another_algorithm_is_refused_before_the_work(tmp_path: Path, blake: pytest.MonkeyPatch) -> None:
    blake.setenv("MODULARFORGE_HASH", "md5")
    with (
        pytest.raises(StoreError, match="MODULARFORGE_HASH must be sha256 or blake3, but is 'md5'"),
        write_artifact(str(tmp_path / "expert"), "expert", "f"),
    ):
        raise AssertionError("the work began")
    assert not (tmp_path / "expert").exists()
