"""A command reads each manifest once, however many experts there are."""

from __future__ import annotations

from collections import Counter

import pytest

from checkpoints import paths
from modularforge.config import Config
from modularforge.pipeline import STAGES
from modularforge.run import Run
from modularforge.stages.evaluate import where


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each manifest is read."""
    found: Counter[str] = Counter()
    read_bytes = paths.read_bytes

    def counted(url: str, *arguments: int | None) -> bytes:
        if url.endswith("manifest.json"):
            found[url] += 1
        return read_bytes(url, *arguments)

    monkeypatch.setattr(paths, "read_bytes", counted)
    return found


def test_all_finished_stages_read_each_manifest_once(finished_run: Config, reads: Counter[str]) -> None:
    run = Run(finished_run)
    for stage in STAGES.values():
        if stage.is_wanted(finished_run):
            for index in stage.indices(finished_run):
                run.make(stage.name, index)
    where(run)
    assert len(reads) == 7 + finished_run.experts.count, "all artifacts of the run"
    assert set(reads.values()) == {1}


def test_an_evaluation_reads_each_manifest_once(
    finished_run: Config, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = finished_run.evaluation.model_copy(update={"tokens_per_domain": 64, "prompts": []})
    other = finished_run.model_copy(update={"evaluation": few})
    run = Run(other)
    url_of = run.url
    monkeypatch.setattr(run, "url", lambda stage, *index: url_of(stage, *index) + "-again" * (stage == "evaluation"))
    run.make("evaluation")
    assert len(reads) >= 8
    assert set(reads.values()) == {1}, reads


def test_an_artifact_that_is_committed_between_two_looks_is_found(finished_run: Config) -> None:
    """`wait` and `status` look while jobs commit: the first look may find nothing and the second a full folder."""
    run = Run(finished_run)
    run.require("expert", 1)
    run._found[run.url("expert", 1)] = None
    assert run.require("expert", 1).manifest.kind == "expert"
