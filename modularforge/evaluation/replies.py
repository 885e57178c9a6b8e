"""What models reply to the test prompts of `evaluation.tasks`, and how good that is.

Prompts are those of training, token for token: the tokens before the last response of an example. Responses to one
prompt are its references. The whole prompt is cut off a reply, and a reply ends where a text does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from modularforge.config import Config, TaskConfig
from modularforge.data.token_files import ExampleTokens
from modularforge.errors import DataError
from modularforge.evaluation.generation import Sampling, continue_batch
from modularforge.evaluation.task_metrics import Marking, check_metrics, measure_replies
from modularforge.log import logger
from modularforge.model.backbone import Decoder
from modularforge.presets import preset_measures
from modularforge.stage_outputs import Corpus

DEFAULT_METRICS, DEFAULT_TOKENS = ("rouge",), 128
SHOWN = 3  # prompts whose replies stand side by side in the report
SHOWN_CHARACTERS = 600


@dataclass
class AskedTask:
    """Prompts as tokens with their references, and what each model has replied so far."""

    settings: TaskConfig
    metrics: Sequence[str]
    new_tokens: int
    marking: Marking
    sampling: Sampling
    batch_size: int
    tokenizer: Tokenizer
    prompts: list[list[int]]
    references: list[list[str]]
    replies: dict[str, list[str]] = field(default_factory=dict)
    cut_prompts: int = 0

    def ask(self, name: str, model: Decoder, ends: Collection[int]) -> None:
        """Let a model reply to every prompt, those of one length together; a reply also ends at one of `ends`."""
        room = model.config.context_length - self.new_tokens
        self.cut_prompts = max(self.cut_prompts, sum(len(prompt) > room for prompt in self.prompts))
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        found: dict[int, str] = {}
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            prompts = [self.prompts[index] for index in chosen]
            replies = continue_batch(model, prompts, self.new_tokens, self._sampling(first), ends)
            texts = self.tokenizer.decode_batch(replies)
            found |= {index: text.strip() for index, text in zip(chosen, texts, strict=True)}
        self.replies[name] = [found[index] for index in range(len(self.prompts))]
        logger.info("%s: %d replies of task %s", name, len(found), self.settings.source)

    def measured(self, name: str) -> tuple[dict[str, float], list[str]]:
        """Each metric of what a model has replied, and what is to be said of them."""
        return measure_replies(self.metrics, self.replies[name], self.references, self.marking)

    def results(self) -> dict[str, Any]:
        """Metrics by model, and the first prompts with all replies; for JSON."""
        notes: dict[str, None] = {}
        models: dict[str, dict[str, float]] = {}
        for name in self.replies:
            models[name], said = self.measured(name)
            notes |= dict.fromkeys(said)
        if self.cut_prompts:
            notes[f"{self.cut_prompts} prompts were too long for the context and lost their beginning."] = None
        examples = [self._example(index) for index in range(min(SHOWN, len(self.prompts)))]
        return {"prompts": len(self.prompts), "models": models, "examples": examples, "notes": list(notes)}

    def _sampling(self, first: int) -> Sampling:
        given = self.sampling
        return Sampling(given.temperature, given.top_k, given.top_p, given.seed + first)

    def _example(self, index: int) -> dict[str, Any]:
        prompt = self.tokenizer.decode(self.prompts[index])
        replies = {name: texts[index][:SHOWN_CHARACTERS] for name, texts in self.replies.items()}
        references = [text[:SHOWN_CHARACTERS] for text in self.references[index]]
        return {"prompt": prompt[-SHOWN_CHARACTERS:], "references": references, "replies": replies}


def prepare_tasks(config: Config, corpus: Corpus) -> list[AskedTask]:
    """The prompts of `evaluation.tasks` from the test split; raises DataError or ConfigError where one cannot be."""
    asked = config.evaluation.tasks or []
    streams = corpus.domains("test") if asked else {}
    return [_prepared(config, corpus, task, streams) for task in asked]


def tasks_identity(config: Config) -> dict[str, str]:
    """What is asked and measured, presets resolved, for the fingerprint of an evaluation; nothing where no task is."""
    asked, sampling = config.evaluation.tasks or [], [config.evaluation.top_k, config.evaluation.top_p]
    found = [
        (task.model_dump(mode="json"), _measures(config, task), *(sampling if task.temperature else ()))
        for task in asked
    ]
    content = json.dumps(found, sort_keys=True)
    return {"tasks": hashlib.sha256(content.encode()).hexdigest()[:32]} if found else {}


def _prepared(config: Config, corpus: Corpus, task: TaskConfig, streams: dict[str, Any]) -> AskedTask:
    stream, measures = streams.get(task.source), _measures(config, task)
    if not isinstance(stream, ExampleTokens):
        raise DataError(
            f"evaluation.tasks names {task.source}, but there are test examples of {', '.join(streams) or 'nothing'}; "
            "name one of these"
        )
    check_metrics(measures["metrics"])
    prompts, references = _asked(stream, corpus.tokenizer, task.prompts)
    marking = Marking(measures["labels"] or _responses(stream, corpus.tokenizer), measures["answer_mark"])
    sampling = Sampling(task.temperature, config.evaluation.top_k, config.evaluation.top_p, config.seed)
    sizes = measures["metrics"], measures["new_tokens"], marking, sampling, config.evaluation.batch_size
    return AskedTask(task, *sizes, corpus.tokenizer, prompts, references)


def _measures(config: Config, task: TaskConfig) -> dict[str, Any]:
    """How a task is measured: by its own settings, else by the preset of its source, else by default."""
    source = next((source for source in config.data.sources if source.name == task.source), None)
    preset = source.example.preset if source and source.example else None
    known = {"metrics": DEFAULT_METRICS, "labels": None, "answer_mark": None, "new_tokens": DEFAULT_TOKENS}
    known |= preset_measures(preset) if preset else {}
    return {name: value if getattr(task, name) is None else getattr(task, name) for name, value in known.items()}


def _asked(stream: ExampleTokens, tokenizer: Tokenizer, most: int) -> tuple[list[list[int]], list[list[str]]]:
    """The first different prompts, and the responses to each."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for index in range(stream.num_examples):
        prompt, response = _sides(stream, index)
        if (key := tuple(prompt)) in found or len(found) < most:
            found.setdefault(key, []).append(response)
    texts = [[text.strip() for text in tokenizer.decode_batch(responses)] for responses in found.values()]
    return [list(prompt) for prompt in found], [list(dict.fromkeys(known)) for known in texts]


def _responses(stream: ExampleTokens, tokenizer: Tokenizer) -> list[str]:
    """All different responses of a stream."""
    responses = [_sides(stream, index)[1] for index in range(stream.num_examples)]
    return list(dict.fromkeys(text.strip() for text in tokenizer.decode_batch(responses)))


def _sides(stream: ExampleTokens, index: int) -> tuple[list[int], list[int]]:
    """Ids of an example before its last response, and of that response."""
    span = slice(int(stream.offsets[index]), int(stream.offsets[index + 1]))
    ids, start = stream.tokens[span].tolist(), int(np.flatnonzero(stream.learned[span] == 0)[-1]) + 1
    return ids[:start], ids[start:]
