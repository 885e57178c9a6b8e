"""The launcher's own files, broken: record, lock, events and metrics give their errors or are passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.events import append_event, merge_events, progress_of, read_all_events
from launcher.layout import events_url, lock_url, record_url
from launcher.lock import is_alive, read_holder, submission_lock
from launcher.record import Record, Submission, load_record, new_record, save_record
from launcher.report import end_report
from launcher.slurm import QueuedJob
from launcher.status import as_json, describe, read_status
from modularforge.config import Config
from modularforge.errors import ConfigError, DataError
from tests import mutation
from tests.conftest import tiny_config
from tests.fuzzing import allows_only

HALF = mutation.FUZZ_INPUTS // 2


def record_of(config: Config) -> Record:
    record = new_record(config)
    record.submissions = [
        Submission("000-backbone-ab", "backbone", job="11"),
        Submission("001-expert-cd", "expert", [0, 2], 0, "12", ["11"], work="run-12345678"),
    ]
    return record


def saved(config: Config) -> bytes:
    save_record(config, record_of(config))
    return Path(record_url(config)).read_bytes()


def mutated(content: bytes) -> Iterator[bytes]:
    """Half of the inputs break the text, half the values in it."""
    yield from mutation.texts([content], HALF)
    for value in mutation.values(json.loads(content), HALF):
        yield json.dumps(value).encode()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr("launcher.status.queue", lambda names: [QueuedJob("12", 0, "RUNNING", "n", "", "None", "x")])
    monkeypatch.setattr("launcher.lock.SETTLE_SECONDS", 0.0)
    return tiny_config(tmp_path / "run")


def test_a_record_is_read_as_it_was_written(config: Config) -> None:
    record = record_of(config)
    save_record(config, record)
    assert load_record(config) == record


def test_a_record_of_an_older_launcher_is_read(config: Config) -> None:
    values = json.loads(saved(config))
    for item in values["submissions"]:
        del item["work"]
    Path(record_url(config)).write_text(json.dumps(values))
    found = load_record(config)
    assert found is not None
    assert [item.work for item in found.submissions] == ["", ""]


@pytest.mark.parametrize(
    ("name", "value"),
    [("job", "--user=root"), ("job", "11 12"), ("group", "../../x"), ("key", "a\nb"), ("work", ".."), ("work", "/etc"),
     ("indices", [10**9]), ("offset", -1), ("after", ["x"])],
)  # fmt: skip
def test_words_in_a_record_that_would_be_options_or_paths_are_refused(config: Config, name: str, value: Any) -> None:
    values = json.loads(saved(config))
    values["submissions"][1][name] = value
    Path(record_url(config)).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"run\.json must be the launcher's record of this run, but"):
        load_record(config)


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_records_are_read_or_refused(config: Config) -> None:
    path, content = Path(record_url(config)), saved(config)

    def read(broken: bytes) -> None:
        path.write_bytes(broken)
        record = load_record(config)
        assert record is not None
        record.settings()
        describe(config, read_status(config, record))
        assert record.events() is not None

    allows_only((DataError, ConfigError), mutated(content), read)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"time": 1e400}', b"[" * 9999, b'{"pid": {}}'])
def test_a_lock_that_says_nothing_is_taken_over(config: Config, content: bytes) -> None:
    path = Path(lock_url(config))
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with submission_lock(config):
        assert b"token" in path.read_bytes()


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_locks_are_judged(config: Config) -> None:
    path = Path(lock_url(config))
    path.parent.mkdir(parents=True)
    good = json.dumps({"host": "elsewhere", "pid": 7, "time": 1e9, "token": "ab"}).encode()

    def read(broken: bytes) -> None:
        path.write_bytes(broken)
        is_alive(read_holder(str(path)))

    allows_only((), mutated(good), read)


@pytest.mark.timeout(1800)  # with ten thousand inputs, on a busy machine
def test_mutated_events_are_read_or_passed_over(config: Config) -> None:
    append_event(config, "expert-0", "started", slurm_job="12_0", key="k", restarts=0, nodes="n", node_count=1, gpus=0,
                 step=0, last_step=3, last_time=None)  # fmt: skip
    append_event(config, "expert-0", "requeued", slurm_job="12_0", reason="by Slurm", step=3)
    append_event(config, "expert-0", "started", slurm_job="12_0", step=3, last_step=5, last_time=9.0)
    append_event(config, "expert-0", "ended", slurm_job="12_0", code=0, reason="finished")
    path, record = Path(events_url(config, "expert-0")), record_of(config)
    lines = path.read_bytes()
    found = read_all_events(config)["expert-0"]
    assert len(found) == 4

    def read(broken: bytes) -> None:
        path.write_bytes(broken)
        merge_events(config, [])
        end_report(config, record.events())
        json.dumps(as_json(read_status(config, record)))

    changed = mutation.values(found, HALF)
    good = ("\n".join(map(json.dumps, item)).encode() for item in changed if isinstance(item, list))
    allows_only((), [*mutation.texts([lines], HALF), *good], read)


@pytest.mark.timeout(1800)
def test_a_torn_or_odd_tail_of_metrics_counts_as_far_as_it_can(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics" / "backbone.jsonl"
    path.parent.mkdir(parents=True)
    good = json.dumps({"job": "backbone", "step": 3, "loss": 2.5, "time": 9.0, "tokens": 5, "tokens_per_second": 2.0})

    def read(broken: bytes) -> None:
        path.write_bytes(broken)
        assert progress_of(config, "backbone").step >= -(2**63)

    allows_only((), mutated(good.encode()), read)
    path.write_bytes(good.encode() + b'\n{"step": "x", "loss": \xff\xfe')
    assert progress_of(config, "backbone").step == 3
    shutil.rmtree(path.parent)
