"""A run on an object store: jobs meet through S3 alone; logs, scripts and code lie in `cluster.work_dir`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from checkpoints import paths
from launcher.layout import folder_name
from modularforge.config import Config
from modularforge.observe.report import write_report
from modularforge.observe.timeline import timeline
from modularforge.run import Run
from tests.cluster.conftest import NODES, Launched
from tests.cluster.slurm import Cluster
from tests.conftest import tiny_values
from tests.storage.conftest import use_environment
from tests.storage.server import SECRET, start_server

ARTIFACTS: list[tuple[str, int | None]] = [
    *((stage, None) for stage in ("prepare-data", "partition", "backbone", "assemble", "calibrate")),
    *(("expert", index) for index in range(3)),
]


class RemoteRun(Launched):
    """A run whose root is a URL; its settings lie beside the work folder."""

    @property
    def config_file(self) -> Path:
        """Its settings as a file."""
        path = Path(self.values["cluster"]["work_dir"]).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.values))
        return path


@pytest.fixture
def remote_run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteRun]:
    (tmp_path / "server").mkdir()
    server = start_server(tmp_path / "server")
    try:
        use_environment(monkeypatch, server.environment())
        monkeypatch.setenv("MODULARFORGE_CACHE", str(tmp_path / "cache"))
        paths.store_of("s3://x")._client.create_bucket(Bucket="runs")  # type: ignore[union-attr]
        nodes = {**NODES, "backbone": {"nodes": 1, "cpus": 1}, "work_dir": str(tmp_path / "work")}
        values = tiny_values("s3://runs/tiny", evaluation={"baselines": []}, cluster=nodes)
        cache = {"MODULARFORGE_CACHE": str(tmp_path / "cache")}
        yield RemoteRun(cluster, values, {**server.environment(), **cache})
    finally:
        server.stop()


@pytest.mark.slow
def test_a_run_on_s3_goes_through_the_cluster_and_gives_the_bytes_of_one_on_a_folder(
    remote_run: RemoteRun, finished_run: Config
) -> None:
    run, work = remote_run, Path(remote_run.values["cluster"]["work_dir"])
    run.launcher("--cluster")
    waited = run.launcher("wait")
    assert [line.split()[0] for line in waited.splitlines() if line.startswith("expert ")] == ["expert"]
    for name, index in ARTIFACTS:
        files = Run(run.config).require(name, index).manifest.files
        assert files == Run(finished_run).require(name, index).manifest.files, name

    rows = run.rows()
    assert {row["state"] for row in rows.values()} == {"committed"}
    assert rows["expert-1"]["step"] == rows["expert-1"]["steps"]
    assert Path(rows["expert-1"]["log"]).parent == work / folder_name("s3://runs/tiny") / "logs"
    assert "finished: s3://runs/tiny/experts/expert-1" in run.launcher("logs", "expert/1")
    assert "finished; nothing to do" in run.launcher("--cluster")
    record = json.loads(paths.read_bytes("s3://runs/tiny/cluster/run.json"))
    assert [item["group"] for item in record["submissions"]] == [
        "prepare-data", "backbone", "expert", "assemble", "evaluate",
    ]  # fmt: skip
    written = [path for path in work.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]

    report, page = write_report("s3://runs/tiny")
    assert report.problems == []
    assert b"data:image/png;base64," in paths.read_bytes(page)
    kinds = {row.name: [span.kind for span in row.spans] for row in timeline(report)}
    assert kinds["expert-2"] == ["queued", "running"], "what the launcher noted in the store"
