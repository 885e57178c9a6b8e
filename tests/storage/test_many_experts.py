"""What many experts ask of an object store: a listing says what is there, and nobody asks for what is not."""

from __future__ import annotations

from collections import Counter

from benchmarks.experts import pretend, settings
from checkpoints import paths
from checkpoints.garbage import find_garbage
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
