"""A model goes to a Hub on this machine, with a card that the Hub's own client reads, and comes back the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from checkpoints import open_artifact
from modularforge.config import Config
from modularforge.errors import DataError
from modularforge.push import push
from modularforge.run import Run
from modularforge.stages.evaluate import chosen_model
from tests.conftest import run_command
from tests.pretrained.hub_server import SmallHub


def no_settings() -> Config:
    raise AssertionError("a model that is named needs no settings")


def environment(hub: SmallHub, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_x"}


@pytest.mark.timeout(300)
def test_the_best_model_of_a_run_is_pushed_with_its_figures_and_without_the_stores_files(
    finished_run: Config, tmp_path: Path
) -> None:
    best = chosen_model(Run(finished_run))
    with SmallHub({}, tmp_path / "uploads") as hub:
        arguments = ("push", "hf://me/mixture@trial", "--output-dir", finished_run.output_dir)
        options = ("--licence", "apache-2.0", "--private")
        done = run_command("modularforge", *arguments, *options, env=environment(hub, tmp_path))
        assert f"uploaded: {hub.url}/me/mixture/commit/" in done.stdout
        assert hub.private == {"me/mixture": True}
        assert hub.branches == ["me/mixture@trial"] * 2, "the branch, and the commit to it"
    there = tmp_path / "uploads" / "me" / "mixture"
    names = {path.name for path in there.iterdir()}
    assert not {"manifest.json", "calibration.json"} & names
    assert {"config.json", "tokenizer.json", "README.md"} <= names
    for name in names - {"README.md"}:
        assert (there / name).read_bytes() == (best.local_folder() / name).read_bytes()
    card = ModelCard.load(there / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    results = open_artifact(Run(finished_run).url("evaluate")).read_json("results.json")
    measured = results["models"][best.manifest.kind]
    figures = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results or []}
    for label, found in measured["domains"].items():
        assert figures[label, "perplexity"] == pytest.approx(found["perplexity"], abs=1e-4)
    assert figures["modularforge", "bits_per_byte"] == pytest.approx(measured["bits_per_byte"], abs=1e-4)
    assert "## What it was made from" in card.text
    assert "## Measured" in card.text


def test_a_dry_run_shows_all_and_asks_nothing(
    finished_run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "HF_ENDPOINT", "http://127.0.0.1:9")
    push(lambda: finished_run, "hf://me/mixture", is_dry=True)
    said = capsys.readouterr().out
    assert "would upload to me/mixture at main (as its owner has new ones)" in said
    assert "  tokenizer.json  " in said
    assert "model-index:" in said
    assert "license:" not in said


def test_figures_are_only_of_the_very_model(
    finished_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a model's files says nothing of what was measured, and needs no run."""
    best = chosen_model(Run(finished_run)).local_folder()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "README.md"):
        (copy / name).write_bytes((best / name).read_bytes())
    push(no_settings, "me/mixture", model=str(copy), is_dry=True)
    assert "model-index" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["hf://mixture", "hf://", "me/../x y"], ids=["no owner", "nothing", "no name"])
def test_a_place_that_cannot_be_is_a_sentence(target: str, finished_run: Config) -> None:
    with pytest.raises(DataError):
        push(lambda: finished_run, target)


@pytest.mark.slow  # its client tries for a while
def test_a_hub_that_cannot_be_reached_is_a_sentence(finished_run: Config, tmp_path: Path) -> None:
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"}
    arguments = ("push", "me/mixture", "--output-dir", finished_run.output_dir)
    done = run_command("modularforge", *arguments, env=variables, check=False)
    assert done.returncode not in (0, 1)
    assert "that you may write to, but the upload broke off" in " ".join((done.stdout + done.stderr).split())
