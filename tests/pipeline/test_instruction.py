"""Task `instruction` through all stages: a stopped job, the identity of its data, replies in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from checkpoints import Artifact
from modularforge.calibration.calibrator import split_documents
from modularforge.config import Config, TaskConfig
from modularforge.config_files import make_config, sample_tasks, to_yaml
from modularforge.data.token_files import ExampleTokens, TokenFileWriter
from modularforge.errors import DataError, Interrupted
from modularforge.evaluation.generation import Sampling, continue_tokens
from modularforge.evaluation.replies import prepare_tasks, tasks_identity
from modularforge.evaluation.scoring import even_loss, summed_losses
from modularforge.experts.job import train_expert
from modularforge.experts.kind import ExpertJob
from modularforge.model.folder import load_model
from modularforge.pipeline import STAGES
from modularforge.run import Run
from modularforge.stages import evaluate
from modularforge.stored_tokens import partition_rows, token_file
from modularforge.study.runs import Runs
from modularforge.study.study import run_study
from modularforge.study.study_file import load_study
from modularforge.tasks.instruction import INSTRUCTION
from modularforge.training.distributed import World
from modularforge.training.job import Job
from tests.conftest import ROOT, prepare_data, run_every_stage, tiny_values

SOURCES = ("banking77", "e2e_nlg", "wikisql")
TASKS = [{"source": "e2e_nlg", "prompts": 4, "new_tokens": 6}, {"source": "banking77", "new_tokens": 4}]


def values_of(folder: Path, **changes: Any) -> dict[str, Any]:
    changes = {"assembly": {"router": "evidence"}, "experts": {"anchored": False}, **changes}
    values = tiny_values(folder, task="instruction", **changes)
    values["data"]["sources"] = [one for one in sample_tasks() if one["name"] in SOURCES]
    values["evaluation"] = {**values["evaluation"], **changes.get("evaluation", {})}
    return values


def config_of(folder: Path, **changes: Any) -> Config:
    return make_config(values_of(folder, **changes), "tests")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run."""
    evaluation = {"tasks": TASKS, "baselines": ["dense", "soup", "joint", "joint_evidence"]}
    config = config_of(tmp_path_factory.mktemp("instruction") / "run", evaluation=evaluation)
    run_every_stage(config)
    return config


def test_partitions_keep_examples_whole_with_what_is_learned(config: Config) -> None:
    run = Run(config)
    partitions, corpus = run.require("partition"), run.corpus
    train = corpus.tokens("train")
    assert train.learned is not None
    for index, row in enumerate(partition_rows(partitions)):
        part = token_file(partitions, f"partition-{index}")
        assert part.learned is not None
        documents = np.load(partitions.local_file(f"partition-{index}.documents.npy"))
        assert row.documents == part.num_documents == len(documents)
        for place, document in enumerate(documents):
            span, own = (slice(*file.offsets[at : at + 2]) for file, at in ((train, document), (part, place)))
            assert train.tokens[span].tolist() == part.tokens[own].tolist()
            assert train.learned[span].tolist() == part.learned[own].tolist()
            ids, learned = part.tokens[own], part.learned[own]
            assert (learned[0], learned[-1], ids[-1]) == (0, 1, corpus.end_token)


def test_every_model_replies_to_every_task_and_the_report_shows_it(config: Config) -> None:
    run = Run(config)
    results = evaluate.run(run)
    assert set(results["tasks"]) == {"e2e_nlg", "banking77"}
    models = {name for name in results["models"] if name != "oracle"}
    for label, columns in (("e2e_nlg", {"bleu", "rouge_l", "meteor"}), ("banking77", {"accuracy"})):
        task = results["tasks"][label]
        assert set(task["models"]) == models
        assert all(columns <= set(row) for row in task["models"].values())
        assert len(task["examples"]) == 3
        assert all(set(example["replies"]) == models for example in task["examples"])
    assert results["tasks"]["e2e_nlg"]["prompts"] == 4
    assert any(len(one["references"]) == 2 for one in results["tasks"]["e2e_nlg"]["examples"]), "all of a prompt"
    report = (Path(config.output_dir) / "evaluation" / "report.md").read_text()
    assert "## Task e2e_nlg" in report
    assert "## Replies of task banking77" in report


@pytest.mark.parametrize("stage", ["assemble", "joint_evidence"])
def test_no_token_ends_a_document_for_a_router_of_examples(stage: str, config: Config) -> None:
    router = load_model(Run(config).require(stage).local_folder()).text_router
    assert router is not None
    assert len(router.get_buffer("ends")) == 0, "the end of a chat's turn is the end of no document"


def test_prompts_are_those_of_training_and_replies_begin_behind_them(config: Config) -> None:
    run = Run(config)
    task = next(one for one in prepare_tasks(config, run.corpus) if one.settings.source == "banking77")
    model = load_model(run.require("backbone").local_folder())
    task.ask("backbone", model, {run.corpus.end_token})
    source = (ROOT / "modularforge/data/sample/tasks/banking77/test.jsonl").read_text().splitlines()
    for record, prompt, known, reply in zip(
        map(json.loads, source), task.prompts, task.references, task.replies["backbone"], strict=True
    ):
        text = f"Name the intent of the customer.\n{record['text']}\nIntent:\n"
        assert run.corpus.tokenizer.decode(prompt) == text
        assert prompt == run.corpus.tokenizer.encode(text).ids
        assert known == [record["label"].replace("_", " ")]
        ids = continue_tokens(model, prompt, 4, Sampling(temperature=0), {run.corpus.end_token})
        assert reply == run.corpus.tokenizer.decode(ids).strip()


def test_the_loss_of_a_domain_is_that_of_its_responses(config: Config) -> None:
    run = Run(config)
    results, model = evaluate.run(run), load_model(run.require("backbone").local_folder())
    stream = run.corpus.domains("test")["banking77"]
    assert isinstance(stream, ExampleTokens)
    total, count = 0.0, 0
    for index in range(stream.num_examples):
        span = slice(*stream.offsets[index : index + 2])
        ids, learned = torch.tensor(stream.tokens[span].astype(np.int64)), torch.tensor(stream.learned[span])
        assert len(ids) <= config.model.context_length
        with torch.no_grad():
            log_TV = model(ids[None, :-1])[0].log_softmax(-1)
        picked = log_TV.gather(1, ids[1:, None])[:, 0][learned[1:] == 1]
        total, count = total - float(picked.sum()), count + len(picked)
    found = results["models"]["backbone"]["domains"]["banking77"]
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    sums = summed_losses(model, {"banking77": stream}, 64, 4, 10**6)
    assert even_loss(sums) == pytest.approx(total / count, abs=1e-5)


def test_a_stopped_expert_goes_on_with_the_same_losses_bit_for_bit(config: Config, tmp_path: Path) -> None:
    run = Run(config)
    partitions = run.require("partition")

    def train(job: Job, stop_at: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        examples = INSTRUCTION.part(config, partitions, 1)
        expert = ExpertJob(config, 1, run.backbone, StoppingTask(stop_at), examples, torch.device("cpu"))
        model, losses = train_expert(expert, INSTRUCTION.validation(config, run.corpus), job, World())
        losses.pop("processor_seconds")
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses

    phase = config.experts.model_copy(update={"steps": 12, "accumulation_steps": 2})
    often = config.training.model_copy(update={"checkpoint_every": 5})
    straight, losses = train(Job("expert-1", phase, often))
    job = Job("expert-1", phase, often, "fingerprint", str(tmp_path / "checkpoints"))
    with pytest.raises(Interrupted):
        train(job, stop_at=7)
    resumed, again = train(job)
    assert again == losses
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


class StoppingTask:
    """The task, whose loss raises at a step as a kill would."""

    def __init__(self, stop_at: int | None) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __getattr__(self, name: str) -> Any:
        return getattr(INSTRUCTION, name)

    def loss(self, model: Any, tensors: Any) -> Any:
        self.calls += 1
        if self.stop_at is not None and self.calls > 2 * self.stop_at:
            raise Interrupted("stopped")
        return INSTRUCTION.loss(model, tensors)


def test_what_is_learned_is_part_of_an_experts_identity(tmp_path: Path) -> None:
    """The same tokens with another border between prompt and response are other data."""
    found: list[tuple[str, str, str]] = []
    for border in ("{{ text }} it is", "{{ text }}"):
        values = values_of(
            tmp_path / str(len(found)), experts={"count": 1, "anchored": False}, partition={"method": "random"}
        )
        values["data"]["sources"] = [values["data"]["sources"][0]]
        words = {"{{ text }} it is": " {{ label }}", "{{ text }}": " it is {{ label }}"}
        values["data"]["sources"][0]["example"] = {"prompt": border, "response": words[border]}
        values["data"]["vocab_size"] = 260  # bytes, so that tokens do not depend on the border
        config = make_config(values, "tests")
        prepare_data(config)
        run = Run(config)
        hashes = [run.require("partition").manifest.files[f"partition-0.{part}.bin"] for part in ("tokens", "learned")]
        found.append((hashes[0].digest, hashes[1].digest, run._input("partition", 0)["partition"]))
    assert found[0][0] == found[1][0]
    assert found[0][1:] != found[1][1:]
    assert found[0][2] != found[1][2]


def test_a_setting_of_the_examples_makes_another_corpus_and_packing_another_backbone(tmp_path: Path) -> None:
    from modularforge.pipeline import stage_settings

    config = config_of(tmp_path)
    padded = config_of(tmp_path, training={"packing": False})
    assert stage_settings(padded, "backbone")["training.packing"] is False
    assert "training.packing" not in stage_settings(config, "backbone")
    assert stage_settings(config, "prepare-data")["task"] == "instruction"
    values = values_of(tmp_path)
    values["data"]["sources"][0]["example"] = {"preset": "banking77", "prompt": "{{ text }}?"}
    assert stage_settings(make_config(values, "tests"), "prepare-data") != stage_settings(config, "prepare-data")


def test_both_halves_of_validation_have_prompts_of_their_own(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path, "validation", 300, has_learned=True) as writer:
        for prompt, response in ((5, 6), (5, 7), (8, 6), (9, 6), (9, 7), (10, 6), (8, 7)):
            ids = np.array([2, prompt, response, 3])
            writer.add(ids, np.array([4]), np.array([0]), np.array([0, 0, 1, 1]))
    from modularforge.data.token_files import open_token_file

    fit_half, decide_half = split_documents(open_token_file(tmp_path, "validation"), ["own"])
    prompts = [set(half["own"].tokens[1::4].tolist()) for half in (fit_half, decide_half)]
    assert prompts[0] | prompts[1] == {5, 8, 9, 10}
    assert prompts[0].isdisjoint(prompts[1]), "also where those of one prompt are no neighbours"


def test_padded_examples_train_too(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", training={"packing": False}, evaluation={"baselines": []})
    prepare_data(config)
    assert isinstance(Run(config).make("backbone"), Artifact)
    stream = Run(config).corpus.tokens("validation").whole
    assert isinstance(stream, ExampleTokens)
    fitted = INSTRUCTION.of_stream(config, stream, 128, 1, seed=0, name="the calibration half of validation")
    assert [len(row) for row in fitted.rows.examples] == [1] * stream.num_examples, "a calibration pads them as well"


def test_a_task_of_no_test_examples_gets_a_sentence(config: Config) -> None:
    unknown = TaskConfig(source="x")
    asked = config.evaluation.model_copy(update={"tasks": [unknown]})
    with pytest.raises(DataError, match="names x, but there are test examples of banking77, e2e_nlg, wikisql"):
        prepare_tasks(config.model_copy(update={"evaluation": asked}), Run(config).corpus)


def test_what_replies_are_drawn_from_is_part_of_their_identity(tmp_path: Path) -> None:
    """A study's results, whose settings are few, have no other sign of it."""

    def identity(temperature: float, top_k: int) -> dict[str, str]:
        task = {"source": "e2e_nlg", "temperature": temperature}
        return tasks_identity(config_of(tmp_path, evaluation={"tasks": [task], "top_k": top_k}))

    assert identity(0.5, top_k=5) != identity(0.5, top_k=50)
    assert identity(0.0, top_k=5) == identity(0.0, top_k=50), "the likeliest token is the same"


def test_stages_of_the_table_know_no_task() -> None:
    assert all("instruction" not in stage.run for stage in STAGES.values())


def test_a_study_measures_replies_on_the_test_split(tmp_path: Path) -> None:
    config = config_of(tmp_path / "unused", evaluation={"tasks": TASKS, "baselines": []})
    (tmp_path / "base.yaml").write_text(to_yaml(config))
    study = {
        "base": str(tmp_path / "base.yaml"),
        "name": "replies",
        "output_dir": str(tmp_path / "study"),
        "seeds": [0],
        "recipes": {"plain": {}},
        "variants": {
            "backbone": {"kind": "backbone"},
            "experts": {"kind": "experts"},
            "evidence": {"kind": "assembled", "without": True, "carry": True, "removal": True},
            "calibrated": {"kind": "assembled", "calibrate": True},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    runs = Runs(load_study(str(tmp_path / "study.yaml")))
    assert "Replies to the prompts" not in Path(run_study(runs, "validation")).read_text()
    page = Path(run_study(runs, "test")).read_text()
    assert "Replies to the prompts of task banking77, in per cent" in page
    table = json.loads((tmp_path / "study" / "table-test.json").read_text())["rows"]
    asked = {name for name, row in table.items() if "tasks" in row}
    assert asked == {"backbone", "experts: best expert", "experts: oracle", "evidence", "calibrated"}
    assert set(table["experts: oracle"]["tasks"]) == {"e2e_nlg", "banking77"}
    assert table["evidence"]["tasks"]["banking77"].keys() == {"accuracy"}


def test_adapters_learn_responses_too_and_their_models_reply(tmp_path: Path) -> None:
    """A kind of expert knows no task: LoRA on examples, one choice of adapters for each of them."""
    experts = {"kind": "lora", "anchored": False, "lora": {"targets": "both", "rank": 2}}
    assembly = {"router": "evidence", "lora": "adapters", "lora_choice": "sequence"}
    evaluation = {"tasks": [{"source": "banking77", "new_tokens": 4}], "baselines": ["joint_lora"]}
    config = config_of(tmp_path / "run", experts=experts, assembly=assembly, evaluation=evaluation)
    results = run_every_stage(config)
    assert {"assembled", "joint_lora", "expert-2"} <= set(results["tasks"]["banking77"]["models"])
    run = Run(config)
    model = load_model(run.require("assemble").local_folder())
    (task,) = prepare_tasks(config, run.corpus)
    task.ask("assembled", model, {run.corpus.end_token})
    alone = [continue_tokens(model, ids, 4, Sampling(temperature=0), {run.corpus.end_token}) for ids in task.prompts]
    assert task.replies["assembled"] == [run.corpus.tokenizer.decode(ids).strip() for ids in alone]
