"""Tasks of lm-eval on the models of a run, from files of this machine, beside what our own scorer says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from checkpoints import paths
from modularforge.cli import app
from modularforge.config import Config
from modularforge.data.loader import IGNORED_TARGET
from modularforge.errors import ConfigError, DataError
from modularforge.evaluation import harness
from modularforge.evaluation.harness import Harness, harness_identity, harness_model, loglikelihoods, until
from modularforge.evaluation.results import checked_results
from modularforge.evaluation.scoring import score_batch
from modularforge.model.backbone import build_backbone
from modularforge.observe.evaluation import markdown
from modularforge.run import Run
from tests.conftest import tiny_config

TASK = {
    "task": "colours",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task file and its data, both on this machine."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"question": f"The law of {n} is", "choices": [" red", " the court", " x"], "answer": n % 3} for n in range(9)
    ]
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "colours.yaml")


def with_harness(config: Config, *names: str, documents: int | None = None) -> Config:
    wanted = {"harness": list(names), "harness_documents": documents}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=wanted)})


def test_log_probabilities_are_those_of_our_own_scorer_whatever_shares_the_batch() -> None:
    config = tiny_config("run")
    torch.manual_seed(0)
    model = build_backbone(config.model, 512)
    pairs = [([5, 6, 7], [8, 9]), ([5], [6]), ([1, 2, 3, 4, 5, 6], [7, 8, 9]), (list(range(10, 90)), [3, 4])]
    together, alone = (loglikelihoods(model, pairs, size) for size in (4, 1))
    for (context, wanted), (found, is_likeliest), single in zip(pairs, together, alone, strict=True):
        assert found == pytest.approx(single[0], abs=1e-4)
        assert is_likeliest == single[1]
        ids = (context + wanted)[-65:]
        targets = torch.tensor([ids[1:]])
        targets[0, : len(ids) - 1 - len(wanted)] = IGNORED_TARGET
        with torch.inference_mode():
            expected = score_batch(model, torch.tensor([ids[:-1]]), targets)
        assert found == pytest.approx(float(expected.sum()), abs=1e-4)
    with torch.inference_mode():
        best = int(model(torch.tensor([[5, 6]]))[0, -1].argmax())
    assert loglikelihoods(model, [([5, 6], [best])], 1)[0][1], "the likeliest token is said to be"


def test_a_text_is_predicted_once_and_replies_end_at_stops(finished_run: Config) -> None:
    run = Run(finished_run)
    model = harness_model(run.backbone.model(), run.corpus.tokenizer, run.corpus.end_token, 4)
    windows = list(harness.rolling_windows(list(range(10)), 99, 4))
    assert windows == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([7], [8, 9])]

    class Asked:
        def __init__(self, *args: object) -> None:
            self.args = args

    (rolled,) = model.loglikelihood_rolling([Asked("The law of the land. " * 30)])
    assert rolled < 0
    (reply,) = model.generate_until([Asked("The law", {"until": ["e"], "max_gen_toks": 12})])
    assert "e" not in reply
    assert until("one\ntwo###three", ["###", "\n"]) == "one"


def test_all_models_of_a_run_do_the_tasks_and_the_report_has_them(
    finished_run: Config, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = finished_run.evaluation.model_copy(update={"tokens_per_domain": 64, "prompts": []})
    config = with_harness(finished_run.model_copy(update={"evaluation": few}), task, documents=6)
    run = Run(config)
    url_of = run.url
    monkeypatch.setattr(
        run, "url", lambda stage, *index: f"{tmp_path}/new" if stage == "evaluate" else url_of(stage, *index)
    )
    results = run.make("evaluate")
    found = results["harness"]["colours"]
    assert set(found["models"]) == {*results["models"]} - {"oracle"}
    assert set(found["models"]["assembled"]) == {"acc", "acc_norm"}
    assert set(found["errors"]["assembled"]) == {"acc", "acc_norm"}
    assert all(
        0 <= row["acc"] <= 1 and round(row["acc"] * 6) == pytest.approx(row["acc"] * 6)
        for row in found["models"].values()
    )
    stored = json.loads(paths.read_bytes(f"{tmp_path}/new/results.json"))
    assert checked_results(stored)["harness"]["colours"]["models"] == found["models"]
    assert "## lm-eval: colours" in markdown(results)
    assert "| assembled |" in markdown(results).split("## lm-eval: colours")[1].split("##")[0]


def test_a_folder_of_no_run_does_the_tasks_without_prepared_text(
    finished_run: Config, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate --model FOLDER --harness TASK` asked for the corpus of a run that the folder has nothing to do with."""
    monkeypatch.chdir(tmp_path)
    folder = str(Path(Run(finished_run).url("assemble")).absolute())
    done = CliRunner().invoke(app, ["evaluate", "--model", folder, "--harness", task], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.exception
    assert "lm-eval: colours" in done.output
    assert "assembled" in done.output


def test_an_evaluation_without_such_tasks_is_the_same_and_another_file_is_another_one(
    finished_run: Config, task: str
) -> None:
    assert harness_identity(finished_run) == {}
    before = harness_identity(with_harness(finished_run, task))
    Path(task).write_text(Path(task).read_text() + "\n# changed\n")
    assert before != harness_identity(with_harness(finished_run, task)) != {}
    assert harness_identity(with_harness(finished_run, "arc_easy")) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "which cannot be read"),
        ("- a list\n", "has no `task:` with a name"),
        ("a: [", "is no YAML"),
    ],
    ids=["missing", "list", "broken"],
)
def test_a_task_file_that_is_none_is_one_sentence(
    finished_run: Config, tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    corpus = Run(finished_run).corpus
    with pytest.raises(ConfigError, match=sentence):
        Harness(with_harness(finished_run, str(tmp_path / "x.yaml")), corpus.tokenizer, corpus.end_token)


def test_data_that_is_missing_is_told_in_the_harness_own_words(finished_run: Config, task: str, tmp_path: Path) -> None:
    (tmp_path / "colours.jsonl").unlink()
    run = Run(finished_run)
    asked = Harness(with_harness(finished_run, task), run.corpus.tokenizer, run.corpus.end_token)
    with pytest.raises(DataError, match=r"evaluation\.harness must name tasks that lm-eval can do here, but it says: "):
        asked.measure("backbone", run.backbone.model())
    with pytest.raises(ConfigError, match="'no_such_task' is none"):
        Harness(with_harness(finished_run, "no_such_task", task), run.corpus.tokenizer, run.corpus.end_token)
