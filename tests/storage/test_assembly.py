"""Assembly on object stores: the same bytes, continued after a kill, copies made by the server, bounded memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.assembly import assemble_once
from checkpoints import Artifact, CorruptArtifactError, open_artifact, paths, plain_folder, write_artifact
from checkpoints.artifact import check_sizes, find_each
from checkpoints.copying import copy_artifact
from checkpoints.s3 import S3Store
from modularforge import edit_experts
from modularforge.assembly import stream
from modularforge.assembly.assemble import assemble
from modularforge.config import Config, ModelConfig
from modularforge.config_files import make_config
from modularforge.errors import MismatchError
from modularforge.experts.ffn import EXPERT_NAME
from modularforge.run import Run
from modularforge.stages import assemble as assemble_stage
from tests.storage.proxy import FaultProxy
from tests.synthetic_models import describe, write_parts


def with_assembly(run: Config, **changes: object) -> Config:
    return run.model_copy(update={"assembly": run.assembly.model_copy(update=changes)})


def parts_on(root: str, run: Config) -> tuple[Artifact, list[Artifact]]:
    """Backbone and experts of the finished run, copied to a store."""
    for name in ("backbone", *(f"experts/expert-{index}" for index in range(3))):
        copy_artifact(open_artifact(f"{run.output_dir}/{name}"), f"{root}/{name}", lambda _: None)
    return open_artifact(f"{root}/backbone"), [open_artifact(f"{root}/experts/expert-{k}") for k in range(3)]


@pytest.mark.parametrize("mode", ["merge", "auto"])
@pytest.mark.parametrize("router", ["trained", "evidence"])
def test_every_store_gets_the_same_bytes(mode: str, router: str, place: str, finished_run: Config, tmp_path) -> None:
    run = with_assembly(finished_run, mode=mode, router=router)
    local = [Run(run).require("expert", index) for index in range(3)]
    (tmp_path / "local").mkdir()
    assemble(run, Run(finished_run).require("backbone"), local, plain_folder(tmp_path / "local"))
    backbone, experts = parts_on(place, finished_run)
    with write_artifact(f"{place}/assembled", "assembled", "0123456789abcdef", resume="0123456789abcdef") as writer:
        assemble(run, backbone, experts, writer)
        artifact = writer.commit()
    artifact.verify()
    found = {name: artifact.read_bytes(name) for name in artifact.manifest.files}
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


class Killed(BaseException):
    """Stands for a process that ends here."""


def test_on_s3_finished_files_are_not_sent_again(s3: str, finished_run: Config, monkeypatch) -> None:
    run = with_assembly(finished_run, mode="merge", max_shard_bytes=150_000)
    backbone, experts = parts_on(s3, finished_run)
    written: list[str] = []
    original = stream.write_file

    def write_file(file, writer, bar=None):
        if len(written) == 2:
            raise Killed
        written.append(file.name)
        return original(file, writer, bar)

    def merge() -> Artifact:
        with write_artifact(f"{s3}/assembled", "assembled", "0123456789abcdef", resume="0123456789abcdef") as writer:
            assemble(run, backbone, experts, writer)
            return writer.commit()

    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_file", write_file)
        with pytest.raises(Killed):
            merge()
    again: list[str] = []

    def write_again(file, *rest):
        again.append(file.name)
        return original(file, *rest)

    monkeypatch.setattr(stream, "write_file", write_again)
    artifact = merge()
    assert len(written) == 2
    assert again
    assert not set(written) & set(again)
    artifact.verify()
    assert not [info.url for info in paths.walk(f"{s3}/assembled") if "journal" in info.url]


def test_on_s3_experts_are_copied_by_the_server(s3: str, finished_run: Config, monkeypatch) -> None:
    backbone, experts = parts_on(s3, finished_run)
    run = with_assembly(finished_run, mode="link")
    read: list[str] = []
    original = S3Store.read

    def reading(store, url, start=0, end=None):
        read.append(url) if (end or 0) - start > 10_000 else None
        return original(store, url, start, end)

    monkeypatch.setattr(S3Store, "read", reading)
    monkeypatch.setattr("checkpoints.safetensors.USUAL_HEADER_BYTES", 1000)  # of experts as small as these
    with write_artifact(f"{s3}/assembled", "assembled", "fedcba9876543210", resume="fedcba9876543210") as writer:
        assemble(run, backbone, experts, writer)
        artifact = writer.commit()
    assert not [url for url in read if url.endswith(EXPERT_NAME)]
    for index, expert in enumerate(experts):
        assert artifact.manifest.files[f"expert-{index + 1:03d}.safetensors"] == expert.manifest.files[EXPERT_NAME]
    artifact.verify()
    local = {name: entry.digest for name, entry in Run(finished_run).require("assemble").manifest.files.items()}
    assert {name: entry.digest for name, entry in artifact.manifest.files.items()} == local


def test_a_large_object_is_copied_in_parts(s3: str, monkeypatch) -> None:
    monkeypatch.setattr("checkpoints.s3.LARGEST_COPY", 5 << 20)
    monkeypatch.setattr("checkpoints.s3.COPY_PART", 5 << 20)
    content = bytes(range(256)) * (12 << 12)
    paths.replace_bytes(f"{s3}/big", content)
    assert paths.copy_inside(f"{s3}/big", f"{s3}/copy")
    assert paths.read_bytes(f"{s3}/copy") == content
    with pytest.raises(FileNotFoundError):
        paths.copy_inside(f"{s3}/missing", f"{s3}/copy")


def test_memory_is_bounded_on_s3_too(s3: str, tmp_path: Path) -> None:
    model = ModelConfig(width=768, layers=3, heads=12, kv_heads=4, ffn_width=2048, context_length=64, tied_head=True)
    backbone, experts = write_parts(s3, model, 8_000, 12)
    describe(tmp_path, backbone, experts)
    found = assemble_once(tmp_path, "merge", "ridge", f"{s3}/out")
    assert found["bytes"] > 300e6
    assert found["peak_mb"] < 300


def test_a_model_pulled_elsewhere_can_still_be_changed(s3: str, finished_run: Config, tmp_path: Path) -> None:
    """The parts are looked for beside the model when they are not where they were."""
    for name in ("backbone", "experts", "data"):
        shutil.copytree(f"{finished_run.output_dir}/{name}", tmp_path / "old" / name)
    run = finished_run.model_copy(update={"output_dir": str(tmp_path / "old")})
    assemble_stage.run(Run(run))
    (tmp_path / "old").rename(tmp_path / "moved")
    for name in ("backbone", "assembled", *(f"experts/expert-{index}" for index in range(3))):
        copy_artifact(open_artifact(str(tmp_path / "moved" / name)), f"{s3}/run/{name}", lambda _: None)
    on_s3 = edit_experts.remove(f"{s3}/run/assembled", 1, f"{s3}/two")
    on_disk = edit_experts.remove(str(tmp_path / "moved/assembled"), 1, str(tmp_path / "two"))
    assert on_s3.manifest.files == on_disk.manifest.files
    assert on_s3.manifest.facts["backbone"]["url"] == f"{s3}/run/backbone"
    shutil.rmtree(tmp_path / "moved/backbone")
    with pytest.raises(MismatchError, match=r"that is neither there nor at .*moved/backbone; bring it back"):
        edit_experts.remove(str(tmp_path / "moved/assembled"), 1, str(tmp_path / "again"))


def test_each_more_expert_costs_few_requests(proxy: FaultProxy, proxied: str, monkeypatch, tmp_path: Path) -> None:
    """Sizes come from a listing; a header and a copy are a request each, the sums two."""
    model = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, ffn_width=32, context_length=16, tied_head=False)
    values = {"data": {"sources": [{"name": "x", "train": "x"}]}, "experts": {"anchored": False, "count": 2}}
    run = make_config({**values, "assembly": {"mode": "link", "router": "means"}}, "a test")
    backbone, experts = write_parts(proxied, model, 64, 16)
    counts = []
    for number in (8, 16):
        monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / f"cache-{number}"))
        proxy.reset()
        with write_artifact(f"{proxied}/assembled-{number}", "assembled", "f") as writer:
            assemble(run, backbone, experts[:number], writer)
            writer.commit()
        counts.append(len(proxy.requests))
    assert counts[1] - counts[0] == 8 * 4


@pytest.mark.parametrize("damage", ["shorter", "gone"])
@pytest.mark.parametrize("count", [2, 9], ids=["few", "many"])
def test_sizes_of_many_experts_are_compared_by_listings(s3: str, damage: str, count: int) -> None:
    model = ModelConfig(width=8, layers=1, heads=1, kv_heads=1, ffn_width=8, context_length=16, tied_head=False)
    backbone, experts = write_parts(s3, model, 16, count)
    check_sizes([backbone, *experts])
    url = experts[1].file_url(EXPERT_NAME)
    if damage == "gone":
        paths.remove(url)
    else:
        paths.replace_bytes(url, b"short")
    with pytest.raises(CorruptArtifactError, match=r"expert-1/.*(missing|truncated)"):
        check_sizes([backbone, *experts])


def test_many_artifacts_are_found_by_a_listing(proxy: FaultProxy, proxied: str) -> None:
    made = [f"{proxied}/experts/expert-{k}" for k in range(12)]
    for number, url in enumerate(made[:5]):
        with write_artifact(url, "expert", "f") as writer:
            writer.write_chunks("a.bin", [b"a" * number])
            writer.commit()
    paths.replace_bytes(f"{made[4]}/manifest.json", b"damaged")
    proxy.reset()
    found = find_each([*made, f"{proxied}/backbone"])
    assert {url: one.manifest.size for url, one in found.items() if one} == {url: k for k, url in enumerate(made[:4])}
    assert {*found} == {*made, f"{proxied}/backbone"} - {made[4]}, "what is wrong with it is said when it is asked for"
    assert len(proxy.requests) == 1 + 5 + 1
