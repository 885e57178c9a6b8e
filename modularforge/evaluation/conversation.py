"""Talk with a model: what was said before stays in its context, as a chat where its tokenizer has a chat template."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer

from checkpoints.screen import say
from modularforge.data.chat_template import TEMPLATE_FILES, ChatTemplate, chat_template, chat_tokenizer
from modularforge.errors import DataError
from modularforge.evaluation.generation import Loaded, Sampling, open_prompt, show, show_pieces, spoken
from modularforge.stored_models import StoredModel

AGAIN = "/new"


@dataclass
class Conversation:
    """What was said so far; with a `template`, messages of a chat, written by it and read by its tokenizer."""

    loaded: Loaded
    template: ChatTemplate | None = None
    tokenizer: Tokenizer | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    def ask(self, words: str, tokens: int, sampling: Sampling) -> str:
        """Print the reply while it comes, and remember it; raises DataError, and then forgets what was asked."""
        if self.template is None:
            text = f"{self.text}\n{words}" if self.text else words
            ids = open_prompt(self.loaded.tokenizer, text, self.loaded.end_tokens)
            show(words, end="")
            reply = show_pieces(spoken(self.loaded, ids, tokens, sampling))
            self.text = text + reply
            return reply
        asked = [*self.messages, {"role": "user", "content": words}]
        assert self.tokenizer is not None
        ids = self.tokenizer.encode(self.template.render(asked, asks=True), add_special_tokens=False).ids
        if not ids:
            raise DataError("the chat template must write what it asks, but writes nothing; leave --chat out")
        reply = show_pieces(spoken(self.loaded, ids, tokens, sampling))
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        return reply

    def forget(self) -> None:
        """Begin again."""
        self.messages, self.text = [], ""


def conversation(loaded: Loaded, stored: StoredModel, chat: bool | None) -> Conversation:
    """A conversation with a model; as a `chat`, which None decides by whether there is a template.

    Raises DataError where a chat is wanted and there is no template.
    """
    found = [stored.bytes_of(name) for name in TEMPLATE_FILES]
    if chat is False:
        return Conversation(loaded)
    try:
        template = chat_template(found[0], found[1], (), "--chat")
    except DataError:
        if chat:
            raise
        return Conversation(loaded)
    return Conversation(loaded, template, chat_tokenizer(stored.file("tokenizer.json").read_bytes()))


def talk(with_whom: Conversation, tokens: int, sampling: Sampling) -> None:
    """Ask for words and reply to them until an empty line, Ctrl-C or the end of the input."""
    what = "a message" if with_whom.template else "a text"
    print(f"Type {what} and press Enter; {AGAIN} forgets what was said, an empty line ends.")
    while True:
        try:
            words = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not words:
            return
        if words.strip() == AGAIN:
            with_whom.forget()
            continue
        try:
            with_whom.ask(words, tokens, sampling)
        except DataError as error:
            say(f"error: {error}")
