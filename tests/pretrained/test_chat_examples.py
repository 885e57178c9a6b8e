"""Chats of a pretrained model's own template as training data: what is learned, and what the data's identity holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modularforge.config_files import complete_config
from modularforge.data.tokenizer import load_tokenizer
from modularforge.evaluation.replies import prepare_tasks
from modularforge.run import Run
from modularforge.stages import backbone
from tests.conftest import prepare_data, tiny_values
from tests.pretrained import models

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("chats")
    source = models.qwen3(root / "model")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    chats = [
        [
            {"role": "user", "content": f"What is {k}?"},
            {"role": "assistant", "content": f"The law {k}."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "The end."},
        ]
        for k in range(24)
    ]
    (root / "chats.jsonl").write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in chats))
    values = tiny_values(
        root / "run", task="instruction", experts={"count": 1, "anchored": False}, backbone={"steps": 2}
    )
    values |= {
        "model": {"pretrained": str(source), "context_length": models.CONTEXT},
        "partition": {"method": "random"},
    }
    splits = {split: str(root / "chats.jsonl") for split in ("train", "validation", "test")}
    values["data"]["sources"] = [{"name": "chats", **splits, "example": {"messages_field": "messages"}}]
    values["assembly"] = {"router": "evidence"}
    values["evaluation"] |= {"tasks": [{"source": "chats", "new_tokens": 4, "prompts": 3}], "baselines": []}
    return values


def test_chats_train_a_pretrained_model_on_its_answers_alone(values: dict[str, Any]) -> None:
    config = complete_config(values, "tests")
    prepare_data(config)
    corpus, tokenizer = Run(config).corpus, load_tokenizer(Path(str(config.model.pretrained)))
    file = corpus.tokens("train")
    assert file.learned is not None
    ids, learned = file.document(3), file.learned[file.offsets[3] : file.offsets[4]]
    assert tokenizer.decode(ids[learned == 1].tolist(), skip_special_tokens=False) == (
        "The law 3.<|endoftext|>The end.<|endoftext|>"
    )
    assert tokenizer.decode(ids[learned == 0].tolist()) == "user: What is 3?\nassistant: \nuser: And then?\nassistant: "
    assert backbone.run(Run(config)).manifest.facts["examples"]["count"] == 20
    (task,) = prepare_tasks(config, corpus)
    assert task.references[0] == ["The end."]
    asked = corpus.tokenizer.decode(task.prompts[0], skip_special_tokens=False)
    assert asked == "user: What is 0?\nassistant: The law 0.<|endoftext|>\nuser: And then?\nassistant: "


def test_another_template_is_other_data(values: dict[str, Any]) -> None:
    config = complete_config(values, "tests")
    before = Run(config).plan("prepare-data").fingerprint
    template = Path(str(config.model.pretrained)) / "chat_template.jinja"
    template.write_text(TEMPLATE.replace("assistant: ", "model: "))
    assert Run(config).plan("prepare-data").fingerprint != before
    template.write_text(TEMPLATE)
    assert Run(config).plan("prepare-data").fingerprint == before
