"""What models are measured on besides the domains: text of no domain, and prompts with known answers.

Text of no domain, which no expert was trained on, is read like the files of a corpus and measured like its domains.
Prompts go through the chat template of an instruct model: measured are the loss of the answers, and what each model
replies.
"""

# R prompts  T tokens of the longest one with its answer

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tokenizers import Tokenizer

from checkpoints.parsing import parse_json
from checkpoints.redact import redact
from modularforge.config import Config, SourceConfig
from modularforge.data.chat_template import TEMPLATE_FILES, chat_template, chat_tokenizer
from modularforge.data.files import find_files, read_text
from modularforge.data.formats import read_file
from modularforge.data.loader import IGNORED_TARGET
from modularforge.data.patterns import file_part
from modularforge.data.token_files import Tokens
from modularforge.data.tokenizer import PAD, encode_texts
from modularforge.errors import DataError, one_line
from modularforge.evaluation.generation import Sampling, continue_each
from modularforge.evaluation.probes import CHAT, UNCOUNTED, Probe, make_probe
from modularforge.model.backbone import Decoder
from modularforge.stage_outputs import Corpus
from modularforge.yaml_text import parse_yaml

Texts = dict[str, list[str]]


class Question(BaseModel):
    """A prompt of the user and the answer that is known to be right."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


@dataclass(frozen=True)
class Chat:
    """Questions as tokens: each prompt as the template writes it, up to where the answer begins."""

    questions: list[Question]
    prompts: list[list[int]]
    answers: list[list[int]]
    tokenizer: Tokenizer
    end_token: int

    def probe(self) -> Probe:
        """The answers' tokens behind their prompts; each is a document of its own."""
        width = max(len(prompt) + len(answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)) - 1
        inputs_RT = np.full((len(self.prompts), width), PAD)
        targets_RT = np.full_like(inputs_RT, IGNORED_TARGET)
        labels_RT = np.full_like(inputs_RT, UNCOUNTED)
        places_RT = np.full_like(inputs_RT, UNCOUNTED)
        for row, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            ids, start = [*prompt, *answer], len(prompt) - 1
            inputs_RT[row, : len(ids) - 1], targets_RT[row, : len(ids) - 1] = ids[:-1], ids[1:]
            labels_RT[row, start : len(ids) - 1] = 0
            places_RT[row, start : len(ids) - 1] = range(len(answer))
        documents_RT = np.broadcast_to(np.arange(len(self.prompts))[:, None], inputs_RT.shape)
        return make_probe(CHAT, (CHAT,), [(inputs_RT, targets_RT, labels_RT, documents_RT, places_RT)])

    def replies(self, model: Decoder, new_tokens: int) -> list[str]:
        """What a model replies to each prompt: the likeliest token each time."""
        ends, greedy = (self.end_token,), Sampling(temperature=0)
        found = continue_each(model, self.prompts, new_tokens, greedy, ends)
        return [text.strip() for text in self.tokenizer.decode_batch(found)]


@dataclass(frozen=True)
class Extras:
    """Text of no domain, by name, and prompts with known answers."""

    texts: Texts = field(default_factory=dict)
    questions: Sequence[Question] = ()

    @property
    def identities(self) -> dict[str, str]:
        """What they are, for the fingerprint of an evaluation; nothing where there are none."""
        found = {"general": texts_identity(self.texts)} if self.texts else {}
        asked = {"chat": [text for question in self.questions for text in (question.prompt, question.answer)]}
        return found | ({"chat": texts_identity(asked)} if self.questions else {})


def read_extras(config: Config) -> Extras:
    """What the settings name; raises DataError where it cannot be read."""
    chat = config.evaluation.chat
    return Extras(read_texts(config.evaluation.general or []), read_questions(chat) if chat else ())


def read_questions(location: str) -> list[Question]:
    """The prompts and answers of a YAML list or of JSON lines; raises DataError."""
    name, text = redact(location), "".join(read_text(location))
    try:
        if location.lower().endswith((".yaml", ".yml", ".json")):
            values = parse_yaml(text)
        else:
            values = [parse_json(line) for line in text.splitlines() if line.strip()]
        found = TypeAdapter(list[Question]).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(
            f"{name} must be a list of prompt and answer, but {place} is not so: {first['msg']:.120}; fix it there"
        ) from error
    except ValueError as error:
        raise DataError(f"{name} must be YAML or JSON lines, but is not ({one_line(error)}); fix it there") from error
    if not found:
        raise DataError(f"{name} must have prompts with answers, but is empty; write some or unset evaluation.chat")
    return found


def prepare_chat(questions: Sequence[Question], corpus: Corpus) -> Chat:
    """The questions as the corpus's tokenizer and chat template write them; raises DataError without a template."""
    files = corpus.artifact.manifest.files
    contents = [corpus.artifact.read_bytes(name) if name in files else None for name in TEMPLATE_FILES]
    template = chat_template(contents[0], contents[1], (), "evaluation.chat")
    tokenizer = chat_tokenizer(corpus.artifact.read_bytes("tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    asked = [[{"role": "user", "content": question.prompt}] for question in questions]
    prompts = [encode(template.render(messages, asks=True)) for messages in asked]
    answers = [encode(question.answer) for question in questions]
    if not all(prompts) or not all(answers):
        raise DataError("every prompt and answer of evaluation.chat must have tokens, but one has none; write text")
    return Chat(list(questions), prompts, answers, tokenizer, corpus.end_token)


def read_texts(locations: Sequence[str]) -> Texts:
    """The documents of each location (path, URL or pattern) by a short name; raises DataError where there are none."""
    found: Texts = {}
    for location in locations:
        source = SourceConfig(name="general", train=location)
        texts = [text for url in find_files(location) for text, _ in read_file(url, source) if text.strip()]
        if not texts:
            raise DataError(f"{redact(location)} must hold text to be measured on, but has none; name another file")
        found[_name(location, found)] = texts
    return found


def texts_identity(texts: Mapping[str, Sequence[str]]) -> str:
    """Identity of the texts, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, documents in texts.items():
        for text in (name, *documents):
            digest.update(len(text).to_bytes(8, "big") + text.encode())
    return digest.hexdigest()[:32]


def token_streams(texts: Mapping[str, Sequence[str]], corpus: Corpus, max_tokens: int) -> dict[str, Tokens]:
    """The documents as tokens one after another, each with its end, in streams of about `max_tokens`."""
    return {
        name: stream_of(documents, corpus.tokenizer, corpus.end_token, max_tokens) for name, documents in texts.items()
    }


def stream_of(documents: Sequence[str], tokenizer: Tokenizer, end_token: int, max_tokens: int) -> Tokens:
    """Documents as tokens one after another, each with its end; ends behind the one that reaches `max_tokens`."""
    ids: list[int] = []
    for text in documents:
        ids += encode_texts(tokenizer, [text])[0].ids
        ids += [end_token] if ids[-1:] != [end_token] else []
        if len(ids) > max_tokens:
            break
    return np.array(ids)


def _name(location: str, taken: Mapping[str, object]) -> str:
    """The last part of a location without its ending; all of it where that is taken."""
    short = file_part(redact(location)).rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    name = short if short.strip("*?[]") else redact(location)
    return name if name not in taken else redact(location)
