"""Special tokens come from us alone: typed in a text, ``</s>`` is ordinary text of ordinary tokens.

`encode_special_tokens` keeps the tokenizers library from matching them, but a model may hold their spelling as an entry
of its own (Unigram, WordPiece, word lists). Then the spelling is cut in two before the model sees it.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

# Where a spelling may stand: alone, within words, after a blank, twice.
CONTEXTS = ("{0}", "a{0}b", "a {0} b", "{0}{0}", ".{0}.")


class SpecialTokenError(ValueError):
    """A tokenizer makes special tokens of text whatever is done; says which."""


def guard_special_tokens(tokenizer: Tokenizer) -> None:
    """Change a tokenizer in place so that no text becomes a special token; raises SpecialTokenError.

    One whose model does not do that (any byte-level BPE) stays as it is, and as fast.
    """
    tokenizer.encode_special_tokens = True
    special = _special_tokens(tokenizer)
    _require_own_ids(tokenizer, special)
    if typed := [text for text, index in special.items() if _becomes(tokenizer, text, index)]:
        cut = pre_tokenizers.Split(Regex("|".join(_first_letter(text) for text in typed)), "isolated")
        own: Any = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, cut]) if own else cut
    for text in typed:
        if _becomes(tokenizer, text, special[text]):
            raise SpecialTokenError(f"it turns the text {text!r:.80} into its special token {special[text]}")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Spelling and id, without the token for what is unknown, which stands for any text; Unigram hides which it is."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    added = tokenizer.get_added_tokens_decoder()
    found = {token.content: index for index, token in added.items() if token.special and token.content}
    return {text: index for text, index in found.items() if text != unknown and "unk" not in text.lower()}


def _require_own_ids(tokenizer: Tokenizer, special: dict[str, int]) -> None:
    shared = {index: text for text, index in tokenizer.get_vocab().items() if special.get(text) != index}
    for text, index in special.items():
        if index in shared:
            raise SpecialTokenError(f"its special token {text!r:.80} has the id {index} of {shared[index]!r:.80}")


def _becomes(tokenizer: Tokenizer, text: str, index: int) -> bool:
    texts = (context.format(text) for context in CONTEXTS)
    return any(index in tokenizer.encode(typed, add_special_tokens=False).ids for typed in texts)


def _first_letter(text: str) -> str:
    """A pattern for the first letter of a spelling where the others follow."""
    first, *rest = (f"\\x{{{ord(letter):x}}}" for letter in text)
    return f"{first}(?={''.join(rest)})"
