"""The questions of the benchmark, and whether a model's own answer is right."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from modularforge.evaluation.extras import Question
from modularforge.evaluation.extras import read_questions as read

FOLDER = Path(__file__).with_name("questions")


def read_questions(split: str) -> list[Question]:
    """The questions of `validation` or `test`."""
    return read(str(FOLDER / f"{split}.yaml"))


def is_right(prompt: str, answer: str) -> bool:
    """Whether the answer has the word that is known to be right."""
    words = yaml.safe_load((FOLDER / "words.yaml").read_text(encoding="utf-8"))
    return re.search(words[prompt], answer) is not None
