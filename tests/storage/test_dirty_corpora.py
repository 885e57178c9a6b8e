"""Cleaning a corpus on a real S3 server that is not as it should be: one sentence, and nothing lost or half done.

By one process and by tasks: shards of other schemas, an object that is gone or another one while it is read, a bucket
that may be read and not listed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from fsspec import get_filesystem_class

from checkpoints import paths
from launcher.tasks import build_tasks
from modularforge.config import Config
from modularforge.config_files import make_config
from modularforge.data import clean_shares, cleaning
from modularforge.errors import DataError
from modularforge.pipeline import CLEANING
from modularforge.run import Run
from tests.conftest import tiny_values
from tests.storage.proxy import Fault, FaultProxy, Request
from tests.unit.test_cleaning import prose

TASKS = (None, 2)
WEB = ("web-0", "web-1")
Values = dict[str, Any]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cleaning, clean_shares):
        monkeypatch.setattr(module, "cores", lambda: 1)
    get_filesystem_class("s3").clear_instance_cache()  # each keeps the server of its first day, and not the proxy


def lines(*records: Values) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_corpus(root: str) -> None:
    """Two shards of training, and a file of each held-out split."""
    for number, name in enumerate((*WEB, "valid", "test")):
        paths.create_bytes(f"{root}/{name}.jsonl", lines(*({"text": prose(10 * number + k)} for k in range(3))))


def config_of(root: str, output: str, tasks: int | None, train: str | list[str] = "web-*.jsonl") -> Config:
    names = [train] if isinstance(train, str) else train
    held_out = {"validation": f"{root}/valid.jsonl", "test": f"{root}/test.jsonl"}
    source = {"name": "web", "train": [f"{root}/{name}" for name in names], **held_out}
    steps = [{"step": "length", "options": {"min_words": 5}}, {"step": "exact"}]
    data = {"sources": [source], "vocab_size": 300, "clean": steps, "max_documents_per_source": None}
    values = tiny_values(output, data=data, partition={"method": "random"})
    return make_config({**values, "cluster": {"prepare_tasks": tasks}}, "tests")


def clean(config: Config) -> dict[str, str]:
    """Do what the jobs of cleaning do; hashes of the files."""
    for task in build_tasks(config):
        if task.group in CLEANING:
            Run(config).make(task.stages[0], task.index)
    return {name: entry.digest for name, entry in Run(config).make("clean").manifest.files.items()}


def refused(config: Config, sentence: str) -> None:
    """Cleaning ends with this sentence, and with no cleaned documents, whole or half."""
    with pytest.raises(DataError, match=sentence):
        clean(config)
    assert not [name for name in paths.list_folder(config.output_dir) if "cleaned" in name and "partial" not in name]


def parquet(**columns: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


OTHER_SHARDS: dict[str, tuple[str, bytes, str]] = {
    "another column": (
        "jsonl",
        lines({"text": "Here."}, {"body": "There."}),
        r"web-2\.jsonl:2 must have a column text",
    ),
    "another type": ("jsonl", lines({"text": ["Here.", "There."]}), r"web-2\.jsonl:1 must have text in column text"),
    "another column, Parquet": (
        "parquet",
        parquet(body=["There."]),
        r"web-2\.parquet must have a column text, but has",
    ),
    "another type, Parquet": ("parquet", parquet(text=[1, 2]), r"web-2\.parquet, row 1 must have text in column text"),
}


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", OTHER_SHARDS)
def test_a_shard_of_another_schema_is_named_and_the_corpus_goes_on_without_it(
    s3: str, tasks: int | None, case: str
) -> None:
    ending, content, sentence = OTHER_SHARDS[case]
    write_corpus(f"{s3}/text")
    config = config_of(f"{s3}/text", f"{s3}/run", tasks, "web-*")
    paths.create_bytes(f"{s3}/text/web-2.{ending}", content)
    refused(config, sentence)
    without = config_of(f"{s3}/text", f"{s3}/other", tasks, [f"{name}.jsonl" for name in WEB])
    assert clean(without) == clean(config_of(f"{s3}/text", f"{s3}/alone", None, "web-[01].jsonl"))


def gone(root: str) -> Callable[[], None]:
    return lambda: paths.remove(f"{root}/web-1.jsonl")


def written_again(root: str) -> Callable[[], None]:
    return lambda: paths.replace_bytes(f"{root}/web-1.jsonl", lines({"text": prose(99)}))


def once_at(action: Callable[[], None], is_the_moment: Callable[[Request], bool]) -> Callable[[Request], Fault | None]:
    """Do something before the first request of a kind is answered, and let all that it asks for itself through."""
    done: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if done or not is_the_moment(request):
            return None
        done.append(request)
        return Fault("do", action=action)

    return rule


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(
    ("change", "said"), [(gone, "gone|does not exist"), (written_again, "written again|bytes and now has")]
)
@pytest.mark.parametrize("moment", ["web-1.jsonl", "valid.jsonl"])
def test_an_object_that_changes_while_it_is_read_is_named_and_put_back_nothing_is_lost(
    proxy: FaultProxy,
    proxied: str,
    tasks: int | None,
    change: Callable[[str], Callable[[], None]],
    said: str,
    moment: str,
) -> None:
    root = f"{proxied}/text"
    write_corpus(root)
    before, alone = paths.read_bytes(f"{root}/web-1.jsonl"), clean(config_of(root, f"{proxied}/alone", None))
    config = config_of(root, f"{proxied}/run", tasks)
    proxy.reset(once_at(change(root), lambda request: request.method == "GET" and moment in request.path))
    refused(config, rf"web-1\.jsonl.*({said})")
    paths.replace_bytes(f"{root}/web-1.jsonl", before)
    proxy.reset()
    assert clean(config) == alone


def not_listed(request: Request) -> Fault | None:
    return Fault("answer", 403, "AccessDenied") if "list-type" in request.path else None


@pytest.mark.parametrize("tasks", TASKS)
def test_of_a_bucket_that_may_not_be_listed_files_are_read_that_are_named(
    proxy: FaultProxy, proxied: str, tmp_path: Any, tasks: int | None
) -> None:
    write_corpus(proxied)
    whole = clean(config_of(proxied, str(tmp_path / "whole"), None))
    proxy.reset(not_listed)
    named = config_of(proxied, str(tmp_path / "named"), tasks, [f"{name}.jsonl" for name in WEB])
    assert clean(named) == whole
    refused(
        config_of(proxied, str(tmp_path / "pattern"), tasks, "web-[0-1].jsonl"),
        r"web-\[0-1\]\.jsonl must match files that may be listed, but the storage says: .*; let it list them \(s3:Li",
    )
