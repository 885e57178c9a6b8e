"""A command reads each manifest once, however many experts there are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from checkpoints import Artifact, MissingArtifactError, find_artifact, paths
from launcher.tasks import build_tasks, finished_tasks
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
    monkeypatch.setattr(run, "url", lambda stage, *index: url_of(stage, *index) + "-again" * (stage == "evaluate"))
    run.make("evaluate")
    assert len(reads) >= 8
    assert set(reads.values()) == {1}, reads


def test_an_artifact_that_is_committed_between_two_looks_is_found(finished_run: Config) -> None:
    """`wait` and `status` look while jobs commit: the first look may find nothing and the second a full folder."""
    run = Run(finished_run)
    run.require("expert", 1)
    run._found[run.url("expert", 1)] = None
    assert run.require("expert", 1).manifest.kind == "expert"


def test_what_was_missing_is_looked_for_again_after_it_was_asked_for_in_vain(
    finished_run: Config, tmp_path: Path
) -> None:
    """A notebook keeps its run for days, while other jobs go on."""
    run = Run(finished_run.model_copy(update={"output_dir": str(tmp_path / "run"), "data_dir": finished_run.data_url}))
    with pytest.raises(MissingArtifactError, match="backbone must be finished first"):
        run.require("expert", 0)
    for folder in ("backbone", "experts"):
        shutil.copytree(f"{finished_run.output_dir}/{folder}", tmp_path / "run" / folder)
    assert run.require("expert", 0).manifest.kind == "expert"


def test_a_run_without_a_backbone_is_not_asked_for_it_by_every_expert(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: Counter[str] = Counter()

    def counted(url: str) -> Artifact | None:
        looks[url] += 1
        return find_artifact(url)

    monkeypatch.setattr("modularforge.run.find_artifact", counted)
    config = finished_run.model_copy(update={"output_dir": str(tmp_path / "run"), "data_dir": finished_run.data_url})
    assert finished_tasks(Run(config), build_tasks(config)) == {"prepare-data"}
    assert max(looks.values()) == 1, looks
