"""What models are measured on besides the domains: text of no domain, and prompts with known answers.

Text of no domain, which no expert was trained on, is read like the files of a corpus and measured like its domains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from checkpoints.redact import redact
from modularforge.artifacts import Corpus
from modularforge.config import Config, SourceConfig
from modularforge.data.files import find_files
from modularforge.data.formats import read_file
from modularforge.data.patterns import file_part
from modularforge.data.token_files import Tokens
from modularforge.data.tokenizer import encode_texts
from modularforge.errors import DataError
from modularforge.evaluation.chat import Question, read_questions

Texts = dict[str, list[str]]


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
        name: _stream(documents, corpus.tokenizer, corpus.end_token, max_tokens) for name, documents in texts.items()
    }


def _stream(documents: Sequence[str], tokenizer: Tokenizer, end_token: int, max_tokens: int) -> Tokens:
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
