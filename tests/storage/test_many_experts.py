"""What many experts ask of an object store: a listing says what is there, and nobody asks for what is not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.experts import pretend, settings
from checkpoints import FileEntry, open_artifact, paths, write_artifact
from checkpoints.artifact import check_sizes, find_each
from checkpoints.garbage import find_garbage
from checkpoints.journal import Journal
from launcher.record import Record
from launcher.status import read_status
from launcher.tasks import build_tasks, finished_tasks
from modularforge.pipeline import checkpoint_url, metrics_url
from modularforge.run import Run
from tests.storage.proxy import FaultProxy

EXPERTS = 12


def kinds(proxy: FaultProxy) -> Counter[str]:
    return Counter("LIST" if "list-type" in request.path else request.method for request in proxy.requests)


def test_status_asks_for_a_manifest_of_each_finished_expert_and_no_more(proxy: FaultProxy, proxied: str) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    pretend(config, ["prepare-data", "partition", "backbone"])
    proxy.reset()
    assert not [name for name in finished_tasks(Run(config), build_tasks(config)) if name.startswith("expert")]
    before = len(proxy.requests)
    pretend(config, ["expert"])
    for name, step in (("expert-0", 40), ("expert-1", 20)):
        paths.replace_bytes(f"{checkpoint_url(config, name)}/step-{step:08d}/manifest.json", b"{}")
    paths.replace_bytes(metrics_url(config, "assembled"), b"")
    proxy.reset()
    rows = read_status(config, Record("a-run", {}, {}), asks_slurm=False)
    found = kinds(proxy)
    assert found["GET"] <= before + EXPERTS
    assert found["HEAD"] == 0
    assert found["LIST"] <= 6
    assert [row.state for row in rows if row.stage == "expert"] == ["committed"] * EXPERTS
    assert [row.checkpoint_step for row in rows if row.stage == "expert"][:3] == [40, 20, None]


def test_a_young_run_is_swept_without_a_look_at_its_manifests(proxy: FaultProxy, proxied: str) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    pretend(config, ["prepare-data", "partition", "backbone"])
    pretend(config, ["expert"])
    proxy.reset()
    assert find_garbage(config.output_dir, grace_seconds=3600) == []
    assert kinds(proxy)["GET"] <= 2, "two listings"
    assert find_garbage(config.output_dir, grace_seconds=-60) == []


@pytest.mark.parametrize("spelled", ["s3a://", "s3://a slash too many"])
def test_many_artifacts_are_found_however_the_place_is_spelled(s3: str, spelled: str) -> None:
    bucket, _, name = s3.removeprefix("s3://").partition("/")
    root = f"s3a://{bucket}/{name}" if spelled == "s3a://" else f"s3://{bucket}//{name}"
    urls = [f"{root}/experts/expert-{k}" for k in range(EXPERTS)]
    for url in urls[:2]:
        with write_artifact(url, "expert", "f") as writer:
            writer.write_chunks("a.bin", [b"a"])
            writer.commit()
    assert {url for url, one in find_each(urls).items() if one} == {*urls[:2]}
    check_sizes([open_artifact(url) for url in urls[:2]])


def test_data_on_this_machine_are_found_by_a_run_on_an_object_store(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    urls = [f"./data-parts/tokenise-{k}" for k in range(EXPERTS)]
    for url in urls:
        with write_artifact(url, "part", "f") as writer:
            writer.commit()
    run = Run(settings("s3://bucket/run", EXPERTS))
    run.look_ahead(urls)
    assert all(run.find(url) for url in urls)


def test_a_journal_that_is_removed_while_it_is_read_is_no_error(s3: str, monkeypatch) -> None:
    journal, entry = Journal(f"{s3}/.journal.json"), FileEntry(1, "0" * 64)
    for name in ("a.bin", "b.bin"):
        paths.replace_bytes(f"{s3}/{name}", b"x")
        journal.add(name, entry)
    assert journal.read(s3) == {"a.bin": entry, "b.bin": entry}
    walk = paths.walk

    def removed_behind(url: str) -> list[paths.FileInfo]:
        found = walk(url)
        journal.remove() if url.endswith(".journal.json") else None
        return found

    monkeypatch.setattr(paths, "walk", removed_behind)
    monkeypatch.setattr("checkpoints.paths.remove", lambda url: paths.store_of(url).delete([i.url for i in walk(url)]))
    assert journal.read(s3) == {}
