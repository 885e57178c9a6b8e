"""What a run's evaluation measures besides its domains, and that its sums, errors and sentences belong together."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from checkpoints import find_artifact, paths
from modularforge.config import Config, PhaseConfig
from modularforge.config_files import make_config
from modularforge.errors import ConfigError, DataError
from modularforge.evaluation.bench import PROBE_SHARE, measure_models
from modularforge.evaluation.results import checked_results
from modularforge.model.backbone import Decoder
from modularforge.observe.evaluation import markdown, verdict
from modularforge.pipeline import stage_url
from modularforge.run import Run
from modularforge.stages import evaluate
from tests.conftest import tiny_values
from tests.synthetic_runs import evaluation


@pytest.fixture(scope="module")
def folder(finished_run: Config) -> Path:
    return paths.local_path(finished_run.output_dir) / "evaluation"


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_every_model_is_measured_on_every_probe(results: dict[str, Any], finished_run: Config) -> None:
    for name, model in results["models"].items():
        assert list(model["probes"]) == ["switch", "mixed"], name
        for probe in model["probes"].values():
            assert list(probe["domains"]) == results["domains"]
            assert probe["mean_loss"] == pytest.approx(sum(d["loss"] for d in probe["domains"].values()) / 3)
    limit = finished_run.evaluation.tokens_per_domain // PROBE_SHARE
    for item in results["models"]["backbone"]["probes"]["switch"]["domains"].values():
        assert limit - finished_run.model.context_length < item["tokens"] <= limit


def test_models_are_held_one_after_another(finished_run: Config) -> None:
    run, held = Run(finished_run), list[weakref.ref[Decoder]]()

    def load() -> Decoder:
        gc.collect()
        assert [model() for model in held] == [None] * len(held)
        model = run.backbone.model()
        held.append(weakref.ref(model))
        return model

    names = ["first", "second"]
    found = measure_models(finished_run, run.corpus, dict.fromkeys(names, load), names)
    assert list(found["models"]) == names
    assert len(held) == 2


def test_sums_over_documents_are_those_of_the_losses(results: dict[str, Any], folder: Path) -> None:
    documents = json.loads((folder / "documents.json").read_text())
    assert documents.keys() == results["models"].keys()
    for name, model in results["models"].items():
        for probe, row in {"text": model, **model["probes"]}.items():
            sums = documents[name][probe]
            for label, item in row["domains"].items():
                assert sum(sums["tokens"][label]) == item["tokens"]
                assert sum(sums["losses"][label]) / item["tokens"] == pytest.approx(item["loss"], abs=1e-5)


def test_the_chosen_model_is_held_against_every_other_one(results: dict[str, Any], folder: Path) -> None:
    chosen = results["models"][results["chosen"]]
    assert set(results["differences"]) == {"backbone", "dense", "oracle", "soup", "assembled"}
    for other, found in results["differences"].items():
        assert list(found) == ["text", "switch", "mixed"]
        for probe, item in found.items():
            mine, theirs = (
                row["mean_loss"] if probe == "text" else row["probes"][probe]["mean_loss"]
                for row in (chosen, results["models"][other])
            )
            assert item["difference"] == pytest.approx(mine - theirs, abs=1e-5)
    report = (folder / "report.md").read_text()
    for title in ("behind a switch", "By position in the window", "By distance from the switch"):
        assert title in report


def test_training_tokens_are_of_all_that_a_model_is_made_of(results: dict[str, Any], finished_run: Config) -> None:
    def tokens(phase: PhaseConfig) -> int:
        return phase.steps * phase.batch_size * finished_run.model.context_length

    backbone, expert = tokens(finished_run.backbone), tokens(finished_run.experts)
    every = backbone + finished_run.experts.count * expert
    expected = dict.fromkeys(("dense", "soup", "oracle", "assembled"), every)
    expected |= {"backbone": backbone, "expert-1": backbone + expert}
    expected["calibrated"] = every + tokens(finished_run.calibration)
    assert {name: results["models"][name]["training_tokens"] for name in expected} == expected


def test_results_of_an_older_version_are_read_and_reported() -> None:
    old = evaluation(2)
    for name in ("differences", "chat"):
        del old[name]
    for model in old["models"].values():
        del model["positions"], model["probes"]
    report = markdown(checked_results(old))
    assert "# synthetic" in report
    assert "switch" not in report


def test_the_verdict_says_where_the_model_is_worse() -> None:
    verdict = markdown(checked_results(evaluation(2))).splitlines()[2]
    assert verdict.startswith("Worth it: ")
    assert "But behind a switch of domain it is worse than the backbone by 0.2000 ± 0.0500" in verdict
    assert "on plain text these are worse than with the backbone: law (by 0.2000)" in verdict


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense_wide", "a dense model of as many active parameters"),
        ("joint_lora", "one adapter trained on the same tokens"),
        ("joint_lora_wide", "one adapter of all experts' rank"),
    ],
)
def test_each_model_without_experts_decides_too(name: str, words: str) -> None:
    found = checked_results(evaluation(2))
    models = found["models"]
    models[name] = {**models["dense"], "mean_loss": float(models[found["chosen"]]["mean_loss"]) - 0.01}
    found["differences"][name] = {"switch": found["differences"]["backbone"]["switch"]}
    said = verdict(found)
    assert said.startswith("Not worth it here: ")
    assert f"{words} has" in said
    assert "Moreover, behind a switch of domain it is worse than the backbone by 0.2000 ± 0.0500; " in said
    assert f"behind a switch of domain it is worse than {words} by 0.2000" in said


def test_text_of_no_domain_is_measured_anew_only_when_it_changes(finished_run: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("backbone", "experts", "assembled", "calibrated"):
        (tmp_path / "run" / name).symlink_to(paths.local_path(finished_run.output_dir) / name)
    readme = tmp_path / "README.md"
    readme.write_text("Install it with make install. int main(void) { return 0; }\n" * 30)
    values = tiny_values(tmp_path / "run", data_dir=finished_run.data_url, evaluation={"baselines": []})
    values["evaluation"]["general"] = [str(readme)]
    config = make_config(values, "tests")
    found = evaluate.run(Run(config))
    assert found["models"]["backbone"]["probes"]["general"]["domains"]["README"]["tokens"] > 100
    assert "general" in found["differences"]["backbone"]
    first = find_artifact(stage_url(config, "evaluate"))
    evaluate.run(Run(config))
    again = find_artifact(stage_url(config, "evaluate"))
    assert first is not None
    assert again is not None
    assert first.manifest.created == again.manifest.created
    readme.write_text("Quite another text. " * 50)
    evaluate.run(Run(config))
    changed = find_artifact(stage_url(config, "evaluate"))
    assert changed is not None
    assert changed.manifest.fingerprint != first.manifest.fingerprint
    values["evaluation"]["general"] = [str(tmp_path / "nowhere.txt")]
    with pytest.raises(DataError, match="nowhere"):
        evaluate.run(Run(make_config(values, "tests")))


def test_chat_without_a_pretrained_model_is_refused_at_once(tmp_path: Path) -> None:
    values = tiny_values(tmp_path / "run")
    values["evaluation"]["chat"] = "questions.yaml"
    with pytest.raises(ConfigError, match=r"evaluation\.chat must be null without model\.pretrained"):
        make_config(values, "tests")
