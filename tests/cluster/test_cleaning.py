"""Four nodes clean a corpus on S3: a node that dies amid its share changes no byte, and only its share is repeated."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from checkpoints import find_artifact, paths
from modularforge.config_files import make_config
from modularforge.run import Run
from tests.cluster.slurm import wait_for
from tests.cluster.test_storage import RemoteRun, remote_run  # noqa: F401
from tests.pipeline.test_cleaning_tasks import make_small, values_of, write_corpus

SMALL = Path(__file__).with_name("small_shards.py")


def has(folder: str) -> bool:
    """Whether an artifact of the run is committed."""
    return find_artifact(f"s3://runs/tiny/{folder}") is not None


@pytest.mark.slow
def test_a_node_that_dies_amid_cleaning_changes_no_byte_of_a_corpus_on_s3(
    remote_run: RemoteRun,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_corpus(tmp_path / "corpus")
    for file in (tmp_path / "corpus").iterdir():
        paths.create_bytes(f"s3://runs/corpus of all/{file.name}", file.read_bytes())
    run, held = remote_run, tmp_path / "held"
    sections = values_of("s3://runs/corpus of all", tmp_path)
    container = f"{sys.executable} {SMALL} {held}"
    run.values |= {"data": sections["data"], "partition": sections["partition"]}
    run.values["cluster"] |= {"prepare_tasks": 4, "container": container}
    run.submit()
    wait_for(held.exists, "task 1 is amid its share", 240)
    for index in (0, 2, 3):
        wait_for(partial(has, f"data-parts/filter_0-{index}"), f"task {index} is finished", 240)
    node = run.events("filter_0-1", "started")[0]["nodes"]
    run.cluster.crash(node)
    try:
        wait_for(lambda: len(run.events("filter_0-1", "started")) == 2, "task 1 starts again", 240)
    finally:
        run.cluster.start_node(node)
    wait_for(lambda: has("data-cleaned"), "the corpus is cleaned", 400)
    starts = {f"filter_{number}-{index}": 1 for number in range(3) for index in range(4)} | {"filter_0-1": 2}
    assert {name: len(run.events(name, "started")) for name in starts} == starts

    make_small(monkeypatch)
    values = yaml.safe_load(run.config_file.read_text())  # the order of options is recorded
    local = {**values, "output_dir": str(tmp_path / "alone"), "cluster": {}}
    alone = Run(make_config(local, "tests")).make("clean").manifest
    made = Run(run.config).require("clean").manifest
    assert made.files == alone.files
    assert made.fingerprint == alone.fingerprint
