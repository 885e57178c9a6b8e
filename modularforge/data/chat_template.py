"""A tokenizer's own chat template: messages in, the text that a model was made to read out, and what of it is learned.

The template comes with the tokenizer (`chat_template.jinja`, or in `tokenizer_config.json`) and runs in Jinja's
sandbox, as transformers runs it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from checkpoints.parsing import parse_object
from modularforge.data.tokenizer import SETTINGS_NAME, load_tokenizer
from modularforge.errors import DataError, one_line

TEMPLATE_FILES = ("chat_template.jinja", SETTINGS_NAME)
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether it is learned."""

    text: str
    is_learned: bool


class _Generation(Extension):
    """`{% generation %}`, with which some templates mark the assistant's words for transformers; it writes nothing."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A template, the spelling of the tokens that it may name (`bos_token` …), and of all special tokens."""

    template: str
    tokens: Mapping[str, str]
    special: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], asks: bool) -> str:
        """The text of a chat, up to where the assistant's answer begins if it `asks` for one; raises DataError."""
        try:
            written: str = _compiled(self.template).render(messages=messages, add_generation_prompt=asks, **self.tokens)
            return written
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(
                f"the chat template must write a chat, but fails ({one_line(error)}); fix the messages, or take a "
                "model with another template"
            ) from error

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The chat up to its last answer; learned are the assistant's words and what the template ends them with.

        An answer begins where the template asks for it, so that a model is asked as it was trained. Raises DataError
        where that is not to be seen in what the template writes.
        """
        whole, found, done = self.render(messages, asks=False), list[Segment](), 0
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, words = self.render(messages[:index], asks=True), str(message["content"]).strip()
                if not asked:
                    raise DataError(
                        "the chat template must write something in front of an answer, but writes nothing; begin the "
                        "chat with a message of the user"
                    )
                # Not beyond this answer: what follows may hold the same words.
                start = whole.find(words, len(asked), len(self.render(messages[: index + 1], asks=False)))
                if not whole.startswith(asked) or start < 0:
                    raise DataError(
                        "the chat template must write an answer behind what it asks with, but writes something else "
                        f"for answer {words!r:.40}; take a model with another template"
                    )
                end = start + len(words)
                end += self._length_of_end(whole[end:])
                found += [Segment(whole[done : len(asked)], False), Segment(whole[len(asked) : end], True)]
                done = end
        return found

    def _length_of_end(self, text: str) -> int:
        """Characters up to the end of the special token that follows an answer; none where no such token does."""
        match = re.match(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")", text) if self.special else None
        return match.end() if match else 0


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _engine().from_string(template)


def _engine() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    found.globals["raise_exception"] = _refuse
    return found


def load_chat_template(folder: Path, wanted_by: str) -> ChatTemplate:
    """The template of the tokenizer in a folder; raises DataError where it has none, for what is `wanted_by`."""
    contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for name in TEMPLATE_FILES]
    return chat_template(contents[0], contents[1], special_spellings(load_tokenizer(folder)), wanted_by)


def chat_template(
    own: bytes | None, settings_file: bytes | None, special: tuple[str, ...], wanted_by: str
) -> ChatTemplate:
    """The same from the contents of `TEMPLATE_FILES`, those that there are."""
    settings = parse_object(settings_file) if settings_file is not None else {}
    tokens = {f"{kind}_token": _content(settings.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk")}
    template = own.decode() if own is not None else _in_settings(settings)
    if template is None:
        raise DataError(
            f"{wanted_by} needs a model with a chat template, but the tokenizer of this run has none; unset "
            f"{wanted_by}, or take an instruct model"
        )
    return ChatTemplate(template, tokens, special)


def chat_tokenizer(content: bytes) -> Tokenizer:
    """A tokenizer from its file; unlike in documents, special tokens in a text are special tokens."""
    tokenizer = Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    return tokenizer


def special_spellings(tokenizer: Tokenizer) -> tuple[str, ...]:
    """How the special tokens are written, the longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    return tuple(sorted((token.content for token in added if token.special and token.content), key=len, reverse=True))


def _in_settings(settings: Mapping[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name, as older versions wrote
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _refuse(message: str) -> str:
    raise TemplateError(message)


def _content(token: Any) -> str:
    """The text of a special token, which may be spelt as an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""
