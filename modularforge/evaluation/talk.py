"""Load a model folder for generation, and a prompt loop on the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tokenizers import Tokenizer

from checkpoints.screen import literal, say
from modularforge.data.tokenizer import load_tokenizer
from modularforge.errors import DataError
from modularforge.evaluation.generation import Sampling, generate
from modularforge.model.backbone import Decoder
from modularforge.model.hub_config import end_tokens
from modularforge.stored_models import stored_model
from modularforge.training.distributed import default_device


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the tokens that end a text."""

    model: Decoder
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]


def load_for_generation(url: str) -> Loaded:
    """Read a model folder: an artifact of any store, or any folder with config, weights and tokenizer."""
    stored = stored_model(url)
    model = stored.load().to(default_device())
    return Loaded(model, load_tokenizer(stored.file("tokenizer.json")), end_tokens(stored.values))


def continue_text(loaded: Loaded, prompt: str, tokens: int, sampling: Sampling) -> str:
    """The continuation of a prompt."""
    return generate(loaded.model, loaded.tokenizer, prompt, tokens, sampling, loaded.end_tokens)


def talk(loaded: Loaded, tokens: int, sampling: Sampling) -> None:
    """Ask for prompts and continue them until an empty line, Ctrl-C or the end of the input."""
    print("Type a text and press Enter; an empty line ends.")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            return
        try:
            show(prompt + continue_text(loaded, prompt, tokens, sampling))
        except DataError as error:
            say(f"error: {error}")


def show(text: str) -> None:
    """Print what a model wrote: as it is into a file, without terminal escapes on a terminal."""
    print(literal(text) if sys.stdout.isatty() else text, flush=True)
