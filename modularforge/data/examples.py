"""Records become examples: what is asked, which is read alone, and what is answered, which is learned.

Prompt and response are fields of a record, or Jinja templates of its fields in a sandbox, or a chat that the
tokenizer's own template writes. What cannot become an example is refused with its file and line.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from modularforge.config import Config, ExampleConfig, SourceConfig
from modularforge.data.chat_template import ChatTemplate, Message, Segment, load_chat_template
from modularforge.data.formats import require_object, require_unicode
from modularforge.data.tokenizer import encode_texts
from modularforge.errors import DataError, one_line

ROLES = ("system", "user", "assistant", "tool")
Segments = tuple[Segment, ...]
BETWEEN = "|"  # names of a field, of which a record has one
Encoded = tuple[list[int], list[int]]
"""Ids, and for each whether it is learned (1 or 0)."""


@dataclass(frozen=True)
class ExampleWriter:
    """How records of one source become examples; `chat` is the tokenizer's template where it is asked for."""

    example: ExampleConfig
    chat: ChatTemplate | None = None

    @property
    def columns(self) -> list[str]:
        """The fields of a record that are read, as far as it has them."""
        example = self.example
        if example.messages_field:
            return example.messages_field.split(BETWEEN)
        sides = ((example.prompt, example.prompt_field or "prompt"), (example.response, response_field(example)))
        return list(dict.fromkeys(name for template, field in sides for name in _names(template, field)))

    def write(self, record: Any, origin: str) -> Iterator[Segments]:
        """The examples of one record, one for each response; raises DataError, `origin` names the record."""
        require_object(record, origin)
        if self.example.messages_field:
            yield self._chat(_messages(record, self.example.messages_field, origin), origin)
            return
        prompt = self._prompt(record, origin)
        for response in self._responses(record, origin):
            if response in (self.example.unlabelled or ()):
                continue
            if self.chat is None:
                yield Segment(prompt, False), Segment(response, True)
            else:
                turns: list[Message] = [{"role": "user", "content": prompt}]
                turns.append({"role": "assistant", "content": response})
                yield self._chat(turns, origin)

    def _prompt(self, record: Mapping[str, Any], origin: str) -> str:
        example = self.example
        if example.prompt is not None:
            return _text(_rendered(example.prompt, record, "prompt", origin), "prompt", origin)
        return _text(_field(record, example.prompt_field or "prompt", "prompt", origin), "prompt", origin)

    def _responses(self, record: Mapping[str, Any], origin: str) -> list[str]:
        example = self.example
        if example.response is not None:
            return [_text(_rendered(example.response, record, "response", origin), "response", origin)]
        found = _field(record, response_field(example), "response", origin)
        return [_text(item, "response", origin) for item in (found if isinstance(found, list) and found else [found])]

    def _chat(self, messages: list[Message], origin: str) -> Segments:
        assert self.chat is not None
        if self.example.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.example.system}, *messages]
        for message in messages:
            typed = next((token for token in self.chat.special if token in message["content"]), None)
            if typed:
                raise DataError(
                    f"{origin} must have messages without special tokens, but one has {typed!r:.40}, which would end "
                    "or begin a turn; take it out"
                )
        try:
            return tuple(self.chat.segments(messages))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error


def example_writers(config: Config, tokenizer_folder: Path | None) -> dict[str, ExampleWriter]:
    """How the records of each source become examples, by the source's name; nothing where sources are plain text."""
    found: dict[str, ExampleWriter] = {}
    for source in config.data.sources:
        example = config.example(source)
        if example is not None:
            found[source.name] = ExampleWriter(example, _chat_template(example, source, tokenizer_folder))
    return found


def response_field(example: ExampleConfig) -> str:
    """The field that is the response."""
    return example.response_field or "response"


@dataclass(frozen=True)
class ExampleEncoder:
    """How examples become tokens; `chat` is a tokenizer for which special tokens in a text are such."""

    tokenizer: Tokenizer
    chat: Tokenizer
    end_token: int

    def encode(self, segments: Segments, is_chat: bool) -> Encoded:
        """Ids of an example, and for each whether it is learned (1); at the end comes the end of text, which is.

        What is read and what is learned are encoded apart, so that a prompt has the same tokens when it is asked. In a
        chat the template's special tokens are special tokens; all other text never becomes one.
        """
        ids: list[int] = []
        learned: list[int] = []
        for segment in segments:
            new = self._ids(segment.text, is_chat, starts=not ids)
            ids += new
            learned += [int(segment.is_learned)] * len(new)
        if ids[-1:] != [self.end_token]:
            ids.append(self.end_token)
            learned.append(1)
        return ids, learned

    def _ids(self, text: str, is_chat: bool, starts: bool) -> list[int]:
        """Ids of a piece; only what starts an example gets what the tokenizer puts before a text."""
        if not is_chat and starts:
            ids: list[int] = encode_texts(self.tokenizer, [text])[0].ids
            return ids[:-1] if ids[-1:] == [self.end_token] else ids
        tokenizer = self.chat if is_chat else self.tokenizer
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found


def _chat_template(example: ExampleConfig, source: SourceConfig, folder: Path | None) -> ChatTemplate | None:
    if not example.is_chat:
        return None
    wanted_by = f"the chat of source {source.name} (data.sources, example)"
    if folder is None:
        raise DataError(
            f"{wanted_by} needs a chat template, but a new tokenizer has none; set model.pretrained to an instruct "
            "model, or write prompts and responses"
        )
    return load_chat_template(folder, wanted_by)


def _messages(record: Mapping[str, Any], field: str, origin: str) -> list[Message]:
    """The messages of a chat, checked; raises DataError."""
    found = _field(record, field, "messages", origin)
    if not isinstance(found, list) or not found or not all(_is_message(item) for item in found):
        raise DataError(
            f"{origin} must have a list of messages with role and content in {field}, but has {found!r:.60}; fix the "
            "record or set messages_field of this source"
        )
    for message in found:
        if message["role"] not in ROLES:
            raise DataError(
                f"{origin} must have messages of {', '.join(ROLES)}, but one is of {message['role']!r:.40}; rename the "
                "role, or leave the message out"
            )
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f"{origin} must have a message of the assistant to learn, but has none; leave the record out")
    for message in found:
        _text(message["content"], "message", origin)
    return found


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and all(isinstance(item.get(name), str) for name in ("role", "content"))


def _field(record: Mapping[str, Any], fields: str, what: str, origin: str) -> Any:
    field = next((name for name in fields.split(BETWEEN) if name in record), None)
    if field is None:
        there = one_line(", ".join(map(str, record))) or "none"
        raise DataError(
            f"{origin} must have the {what} in a field {fields.replace(BETWEEN, ' or ')}, but has {there:.200}; "
            f"set {what}_field in the example of this source, or a template"
        )
    return record[field]


def _text(value: Any, what: str, origin: str) -> str:
    if not isinstance(value, str) or not value.strip():
        said = "is empty" if isinstance(value, str) else f"is a {type(value).__name__}"
        raise DataError(f"{origin} must have a {what} that is text, but it {said}; fix the record or leave it out")
    require_unicode(value, origin)
    return value


@functools.cache
def _engine() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written)


def _written(value: Any) -> Any:
    """What a template writes for a value; null and containers would be learned as Python spells them."""
    if value is None or isinstance(value, dict | list):
        raise TemplateError(f"it would write {value!r:.40}, which is no text")
    return value


@functools.lru_cache(maxsize=256)
def _template(text: str) -> Any:
    return _engine().from_string(text)


def _rendered(template: str, record: Mapping[str, Any], what: str, origin: str) -> str:
    try:
        written: str = _template(template).render(**{str(name): value for name, value in record.items()})
        return written
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        fields = one_line(", ".join(map(str, record)))
        raise DataError(
            f"{origin} must fit the template of the {what}, but does not ({one_line(error)}); it has the fields "
            f"{fields:.200}: fix the template in the example of this source"
        ) from error


def _names(template: str | None, field: str) -> list[str]:
    """The fields that a template names, or those in its place."""
    if template is None:
        return field.split(BETWEEN)
    try:
        return sorted(meta.find_undeclared_variables(_engine().parse(template)) - _engine().globals.keys())
    except TemplateError as error:
        raise DataError(
            f"a template in data.sources must be Jinja, but is not ({one_line(error)}): {template!r:.80}; fix it"
        ) from error
