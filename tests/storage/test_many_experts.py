"""What many experts ask of an object store: a listing says what is there, and nobody asks for what is not."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import experts
from benchmarks.experts import pretend, settings
from checkpoints import FileEntry, open_artifact, paths, write_artifact
from checkpoints.artifact import check_sizes, find_each
from checkpoints.garbage import find_garbage
from checkpoints.journal import Journal
from checkpoints.keys import packed
from checkpoints.labels import Label
from checkpoints.notes import add_line, read_folder, read_lines
from checkpoints.s3 import open_client
from checkpoints.transfer import select, transfer
from checkpoints.urls import LABEL
from launcher.events import append_event, progress_of_each, read_all_events, read_events
from launcher.record import Record, save_record
from launcher.report import finish_run
from launcher.runs import final_report
from launcher.status import Row, read_status
from launcher.tasks import build_tasks, finished_tasks
from modularforge.config import Config
from modularforge.errors import MismatchError
from modularforge.pipeline import Stage, checkpoint_url, metrics_url
from modularforge.run import Run
from tests.storage.proxy import Fault, FaultProxy
from tests.synthetic_models import fill_expert

EXPERTS = 12


def kinds(proxy: FaultProxy) -> Counter[str]:
    return Counter("LIST" if "list-type" in request.path else request.method for request in proxy.requests)


RECORD = Record("a-run", {}, {})


def asked_by_status(config: Config, proxy: FaultProxy) -> tuple[Counter[str], list[Row]]:
    proxy.reset()
    rows = [row for row in read_status(config, RECORD, asks_slurm=False) if row.stage == "expert"]
    assert [row.state for row in rows] == ["committed"] * len(rows)
    return kinds(proxy), rows


def test_status_of_finished_experts_is_read_from_listings(
    proxy: FaultProxy, proxied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    monkeypatch.setattr(experts, "fill_expert", lambda *given: fill_expert(*given) | {"train_loss": 2.5})
    pretend(config, ["prepare-data", "partition", "backbone"])
    proxy.reset()
    assert not [name for name in finished_tasks(Run(config), build_tasks(config)) if name.startswith("expert")]
    before = len(proxy.requests)
    pretend(config, ["expert"])
    for index in range(EXPERTS):
        append_event(config, f"expert-{index}", "started", slurm_job=f"7_{index}", log=f"/logs/{index}")
        append_event(config, f"expert-{index}", "requeued", slurm_job=f"7_{index}", reason="preempted", step=1)
        append_event(config, f"expert-{index}", "ended", slurm_job=f"7_{index}", code=0, reason="finished")
    found, rows = asked_by_status(config, proxy)
    assert found["HEAD"] == 0
    assert found["LIST"] <= 5
    assert found["GET"] <= before + 2, "none of an expert"
    assert sum(found.values()) <= 10
    assert [row.requeues for row in rows] == [1] * EXPERTS
    assert rows[3].log == "/logs/3"
    assert {(row.step, row.steps, row.loss) for row in rows} == {(config.experts.steps, config.experts.steps, 2.5)}


def test_what_all_experts_read_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert costs its own plan: of ten thousand, each would compare backbone and data with what made them anew."""
    asked: Counter[str] = Counter()
    plan, indices = Run.plan, Stage.indices
    monkeypatch.setattr(Run, "plan", lambda run, stage, *given: asked.update([stage]) or plan(run, stage, *given))
    monkeypatch.setattr(Stage, "indices", lambda stage, config: asked.update(["lists"]) or indices(stage, config))
    found = []
    for count in (EXPERTS, 3 * EXPERTS):
        config = settings(str(tmp_path / str(count)), count)
        pretend(config, ["prepare-data", "partition", "backbone"])
        pretend(config, ["expert"])
        asked.clear()
        finished = finished_tasks(Run(config), build_tasks(config))
        assert len([name for name in finished if name.startswith("expert")]) == count
        found.append(dict(asked))
    assert found[1].pop("expert") == 3 * found[0].pop("expert")
    assert found[0] == found[1]


@pytest.mark.parametrize("harm", ["missing", "stale", "damaged", "of another fingerprint"])
def test_a_label_is_never_believed_over_the_manifest(proxy: FaultProxy, proxied: str, harm: str) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    pretend(config, ["prepare-data", "partition", "backbone"])
    pretend(config, ["expert"])
    usual, _ = asked_by_status(config, proxy)
    run = Run(config)
    label = next(info.url for info in paths.walk(run.url("expert", 4)) if f"/{LABEL}/" in info.url)
    place, _, text = label.rpartition("/")
    store = paths.store_of(label)
    if harm == "stale":  # the manifest is another one than the label was written for
        paths.replace_bytes(label.replace(place.rpartition("/")[2], "0" * 32), b"")
    if harm == "damaged":
        paths.replace_bytes(f"{place}/{text[:-9]}", b"")
    if harm == "of another fingerprint":
        paths.replace_bytes(f"{place}/" + packed(b'["expert","0123",{}]'), b"")
    store.delete([label])
    found, _ = asked_by_status(config, proxy)
    assert found["GET"] == usual["GET"] + 1
    paths.store_of(label).delete([f"{run.url('expert', 4)}/manifest.json"])  # what labels are left is of nobody
    assert Run(config).done("expert", 4) is None
    assert "expert-4" not in finished_tasks(Run(config), build_tasks(config))


def test_an_expert_of_other_settings_is_refused_with_what_differs_although_it_has_a_label(s3: str) -> None:
    config = settings(f"{s3}/run", EXPERTS)
    pretend(config, ["prepare-data", "partition", "backbone"])
    pretend(config, ["expert"])
    changed = config.model_copy(update={"experts": config.experts.model_copy(update={"steps": 7})})
    with pytest.raises(MismatchError, match=r"experts/expert-0 .*experts\.steps is 7 here"):
        finished_tasks(Run(changed), build_tasks(changed))


def test_an_artifact_whose_label_cannot_be_written_is_committed(proxy: FaultProxy, proxied: str) -> None:
    proxy.reset(lambda request: Fault("answer", 403, "AccessDenied") if f"/{LABEL}/" in request.path else None)
    with write_artifact(f"{proxied}/x", "expert", "f") as writer:
        artifact = writer.commit({"steps": 3})
    artifact.verify()
    assert open_artifact(f"{proxied}/x").manifest.facts == {"steps": 3}


def test_jobs_under_way_are_asked_for_metrics_and_few_for_their_own_checkpoints(
    proxy: FaultProxy, proxied: str, monkeypatch
) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    for name, step in (("expert-0", 40), ("expert-1", 20)):
        paths.replace_bytes(f"{checkpoint_url(config, name)}/step-{step:08d}/manifest.json", b"{}")
        paths.replace_bytes(metrics_url(config, name), b'{"step": 41, "loss": 2.5}\n')
    jobs, done = [f"expert-{index}" for index in range(EXPERTS)], {"expert-2": Label("expert", "f", {"steps": 60})}
    for among, listings in ((100, 2), (5, 3)):
        monkeypatch.setattr("launcher.events.JOBS_OF_A_LISTING", among)
        proxy.reset()
        found = progress_of_each(config, jobs, done)
        assert kinds(proxy) == {"LIST": listings, "GET": 2}
        assert [found[job].checkpoint_step for job in jobs[:3]] == [40, 20, 0]
        assert [found[job].step for job in jobs[:4]] == [41, 41, 60, 0]
    proxy.reset()
    progress_of_each(config, ["expert-2"], done)
    assert not proxy.requests


@pytest.mark.parametrize("line", ["short", "too long for a key"])
def test_notes_of_many_jobs_are_one_listing(proxy: FaultProxy, proxied: str, line: str) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    log = "/x" if line == "short" else "".join(map(chr, random.Random(0).choices(range(97, 123), k=1500)))
    for index in range(EXPERTS):
        append_event(config, f"expert-{index}", "started", slurm_job=str(index), log=log)
        append_event(config, f"expert-{index}", "ended", slurm_job=str(index), code=0, reason="finished")
    proxy.reset()
    found = read_all_events(config)
    assert kinds(proxy) == ({"LIST": 1} if line == "short" else {"LIST": 1, "GET": EXPERTS})
    for index in range(EXPERTS):
        events = found[f"expert-{index}"]
        assert [event["event"] for event in events] == ["started", "ended"]
        assert events[0]["log"] == log
        assert events == read_events(config, f"expert-{index}")


def test_notes_of_older_versions_come_before_those_added_since(place: str) -> None:
    url = f"{place}/events/backbone.jsonl"
    paths.replace_bytes(url, b'{"a": 1}\n')
    for number in (2, 3):
        add_line(url, b'{"a": %d}' % number)
    assert read_lines(url) == b'{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    assert read_folder(f"{place}/events") == {"backbone": read_lines(url)}


@pytest.mark.parametrize("key", ["", "AAAA", "no letters!", "x" * 300])
def test_a_key_that_holds_no_line_is_read(s3: str, key: str) -> None:
    url = f"{s3}/events/backbone.jsonl"
    add_line(url, b"first")
    paths.replace_bytes(f"{s3}/events/backbone/{9 * 10**19}-00000000/{key}".rstrip("/"), b"second")
    paths.replace_bytes(f"{s3}/events/backbone/of somebody else", b"third")
    known = b"first\nsecond\n" if key != "no letters!" else b"first\n"
    assert read_lines(url) == known


def test_a_pulled_run_has_its_notes_as_files(s3: str, tmp_path: Path) -> None:
    config = settings(f"{s3}/run", EXPERTS)
    with write_artifact(f"{s3}/run/backbone", "backbone", "f") as writer:
        writer.commit()
    append_event(config, "backbone", "started", slurm_job="1")
    append_event(config, "backbone", "ended", slurm_job="1", code=0, reason="finished")
    expected = read_all_events(config)
    for target in (str(tmp_path / "there"), f"{s3}/again"):
        outcome = transfer(select(f"{s3}/run", False), target, lambda _: None)
        assert not outcome.problems
        assert paths.join(target, "cluster/events/backbone.jsonl") in outcome.copied_files
        assert read_all_events(config.model_copy(update={"output_dir": target})) == expected


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


def test_a_whole_run_tells_the_end_report_that_its_last_job_left(proxy: FaultProxy, proxied: str) -> None:
    config = settings(f"{proxied}/run", EXPERTS)
    save_record(config, RECORD)
    rows = [Row(f"expert-{index}", "expert", "committed", job=f"7_{index}") for index in range(EXPERTS)]
    for row in rows:
        append_event(config, row.task, "started", slurm_job=row.job, node_count=1)
        append_event(config, row.task, "ended", slurm_job=row.job, code=0, reason="finished")
        paths.replace_bytes(metrics_url(config, row.task), b'{"tokens": 10, "tokens_per_second": 5, "loss": 2}\n')
    finish_run(config)
    proxy.reset()
    text = final_report(config, rows)
    assert kinds(proxy)["LIST"] == 0
    assert sum(kinds(proxy).values()) <= 3, "nobody's metrics"
    for more in ([*rows, Row("expert-12", "expert", "committed", job="8")], [*rows, Row("dense", "dense", "failed")]):
        proxy.reset()
        assert final_report(config, more) == text, "made anew, as it may have changed"
        assert kinds(proxy)["GET"] >= EXPERTS


def test_assembly_asks_for_each_manifest_once(proxy: FaultProxy, proxied: str) -> None:
    asked = []
    for count in (8, 16):
        config = settings(f"{proxied}/run-{count}", count)
        pretend(config, ["prepare-data", "partition", "backbone"])
        pretend(config, ["expert"])
        proxy.reset()
        Run(config).make("assemble")
        asked.append(Counter(request.path for request in proxy.requests if request.method == "GET"))
    manifests = [sum(n for path, n in found.items() if path.endswith("/manifest.json")) for found in asked]
    assert manifests[1] - manifests[0] == 8, "K and a constant, to check the experts and to read what they are"
    assert max(n for path, n in asked[1].items() if "/expert-" in path and path.endswith("/manifest.json")) == 1
    assert sum(asked[1].values()) - sum(asked[0].values()) <= 8 * 4


def test_a_store_by_http_is_sent_no_checksum_beside_the_signature(proxy: FaultProxy, proxied: str, monkeypatch) -> None:
    paths.replace_bytes(f"{proxied}/a", b"content")
    names = {name.lower(): value for name, value in proxy.requests[-1].headers.items()}
    assert not [name for name in names if name.startswith(("x-amz-checksum", "x-amz-trailer", "content-encoding"))]
    assert names["x-amz-content-sha256"] == hashlib.sha256(b"content").hexdigest()
    for variable, expected in (("https://127.0.0.1:1", "when_supported"), ("http://127.0.0.1:1", "when_required")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", variable)
        assert open_client({}).meta.config.request_checksum_calculation == expected
