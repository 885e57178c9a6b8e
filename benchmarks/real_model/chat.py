"""Questions with known answers through the chat template: the loss of the answer, and what a model says itself."""

# R rows (questions)  T tokens of the longest

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
import yaml
from tokenizers import Tokenizer

from modularforge.evaluation.generation import Sampling, generate
from modularforge.evaluation.probes import CHAT, UNCOUNTED, Probe
from modularforge.model.backbone import Decoder

QUESTIONS = Path(__file__).with_name("questions.yaml")


@dataclass(frozen=True)
class Question:
    """A question, a good answer, and a pattern that every right answer has in it."""

    question: str
    answer: str
    word: str


def read_questions(split: str) -> list[Question]:
    """The questions of `validation` or `test`."""
    return [Question(**item) for item in yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))[split]]


class Chat:
    """The chat template of a model folder, whose special tokens become special here, other than in texts."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.template = jinja2.Environment().from_string(settings["chat_template"])
        self.end = str(settings["eos_token"])

    def prompt(self, question: str) -> str:
        """What the model reads before it answers."""
        messages = [{"role": "user", "content": question}]
        return self.template.render(messages=messages, add_generation_prompt=True)

    def probe(self, questions: list[Question]) -> Probe:
        """One row a question; only the answer and its end count, each question is a document of its own."""
        prompts = [self.tokenizer.encode(self.prompt(item.question)).ids for item in questions]
        answers = [self.tokenizer.encode(item.answer + self.end).ids for item in questions]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - 1
        rows = np.zeros((5, len(questions), longest), np.int32)
        rows[2] = UNCOUNTED
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids, first, end = prompt + answer, len(prompt) - 1, len(prompt) + len(answer) - 1
            rows[0, row, :end], rows[1, row, :end] = ids[:-1], ids[1:]
            rows[2, row, first:end], rows[3, row] = 0, row
            rows[4, row, first:end] = np.arange(len(answer))
        return Probe(CHAT, (CHAT,), *torch.from_numpy(rows))

    def answer(self, model: Decoder, question: str, most_tokens: int = 24) -> str:
        """The model's own answer, greedily."""
        ends = (self.tokenizer.token_to_id(self.end),)
        return generate(model, self.tokenizer, self.prompt(question), most_tokens, Sampling(temperature=0), ends)


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer has the word."""
    return re.search(question.word, answer) is not None
