"""Chat prompts with known answers: prompts as transformers writes them, and the loss of the answers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from modularforge.config import Config
from modularforge.config_files import complete_config
from modularforge.errors import DataError
from modularforge.evaluation.extras import prepare_chat, read_questions
from modularforge.evaluation.scoring import score
from modularforge.model.folder import load_model
from modularforge.run import Run
from modularforge.stage_outputs import Corpus
from modularforge.stages import backbone, evaluate
from tests.conftest import prepare_data, tiny_values
from tests.pretrained import models

TEMPLATE = """{%- if messages[0]['role'] == 'system' -%}no{%- endif -%}
{% for message in messages %}
{{ '<|endoftext|>' + message['role'] + '\\n' + message['content'] | trim + eos_token }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""
QUESTIONS = """
- {prompt: "What is the law?", answer: "A section."}
- {prompt: "And the end <|endoftext|> of it?", answer: "It was the end."}
- {prompt: "Who?", answer: "He"}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("chat")
    source = models.qwen3(root / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    (root / "questions.yaml").write_text(QUESTIONS)
    values = tiny_values(root / "run", backbone={"steps": 0}, evaluation={"baselines": []})
    values["evaluation"]["chat"] = str(root / "questions.yaml")
    values["model"] = {"pretrained": str(source), "context_length": models.CONTEXT}
    made = complete_config(values, "tests")
    prepare_data(made)
    backbone.run(Run(made))
    return made


def test_prompts_are_those_that_transformers_writes(config: Config) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(config.model.pretrained)
    questions = read_questions(str(config.evaluation.chat))
    chat = prepare_chat(questions, Corpus(Run(config).require("prepare-data")))
    for question, ids in zip(questions, chat.prompts, strict=True):
        messages = [{"role": "user", "content": question.prompt}]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert chat.end_token in chat.prompts[0]


def test_the_loss_is_that_of_the_answers_behind_their_prompts(config: Config) -> None:
    chat = prepare_chat(read_questions(str(config.evaluation.chat)), Corpus(Run(config).require("prepare-data")))
    model, probe = load_model(Run(config).require("backbone").local_folder()), chat.probe()
    scores_RT = score(model, probe, 2)
    for row, (prompt, answer) in enumerate(zip(chat.prompts, chat.answers, strict=True)):
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
        naive = [float(logits_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)]
        assert scores_RT[row][probe.labels_RT[row] == 0].tolist() == pytest.approx(naive, abs=1e-4)


def test_replies_stand_side_by_side_in_the_report(config: Config) -> None:
    results = evaluate.run(Run(config))
    assert len(results["chat"]["replies"]["backbone"]) == 3
    assert results["models"]["backbone"]["probes"]["chat"]["domains"]["chat"]["tokens"] > 3
    report = (Path(config.output_dir) / "evaluation" / "report.md").read_text()
    assert "## Replies to chat prompts" in report
    assert "What is the law?" in report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {prompt: hello}", "0.answer"),
        ("- {prompt: '', answer: b}", "0.prompt"),
        ("[]", "empty"),
        ("prompt: [", "must be YAML or JSON lines"),
    ],
)
def test_a_file_of_questions_that_is_none_is_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "questions.yaml").write_text(content)
    with pytest.raises(DataError) as caught:
        read_questions(str(tmp_path / "questions.yaml"))
    assert message in str(caught.value)


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d"}\n')
    assert [item.answer for item in read_questions(str(tmp_path / "questions.jsonl"))] == ["b", "d"]


def test_a_model_without_a_template_and_a_prompt_that_is_too_long_are_refused(config: Config, tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_text(f"- {{prompt: '{'word ' * 200}', answer: b}}")
    evaluation = config.evaluation.model_copy(update={"chat": str(long)})
    with pytest.raises(DataError, match="must have at most"):
        evaluate.run(Run(config.model_copy(update={"evaluation": evaluation})))
    source = models.mistral(tmp_path / "model")
    for file in (source / "chat_template.jinja",):
        file.unlink(missing_ok=True)
    values = tiny_values(tmp_path / "run", backbone={"steps": 0}, evaluation={"baselines": []})
    values["evaluation"]["chat"] = config.evaluation.chat
    values["model"] = {"pretrained": str(source), "context_length": models.CONTEXT}
    other = complete_config(values, "tests")
    prepare_data(other)
    backbone.run(Run(other))
    with pytest.raises(DataError, match="needs a model with a chat template"):
        evaluate.run(Run(other))
