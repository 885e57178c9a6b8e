"""What a recogniser got wrong: word and character error rates over a corpus, tokens, strings, and its worst utterances.

Rates are pooled: errors of all utterances over words (or characters) of all references, so that a long utterance weighs
more than a short one. Text of Chinese, Japanese or Thai has no spaces between words, so its words are its characters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modularforge.speech.audio import require_package

UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
UNSPACED_SHARE = 0.5


@dataclass(frozen=True)
class Errors:
    """Units that were substituted, deleted and inserted, of so many in the reference."""

    substitutions: int
    deletions: int
    insertions: int
    units: int

    @property
    def count(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over units; without units 0 where nothing was inserted, else infinite."""
        if self.units:
            return self.count / self.units
        return math.inf if self.count else 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


NONE = Errors(0, 0, 0, 0)


@dataclass(frozen=True)
class Pair:
    """What was said, and what was written; `audio` and `seconds` are for the listing."""

    reference: str
    hypothesis: str
    audio: str = ""
    seconds: float = 0.0


def normalise(text: str) -> str:
    """Lower case, without punctuation, with single spaces, in Unicode's NFKC: what is compared."""
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(letter if _is_kept(plain, index) else " " for index, letter in enumerate(plain))
    return " ".join(kept.split())


def _is_kept(text: str, index: int) -> bool:
    """Letters, digits, marks, symbols, and apostrophes within words."""
    letter = text[index]
    if letter in "'’":
        return 0 < index < len(text) - 1 and text[index - 1].isalnum() and text[index + 1].isalnum()
    return not unicodedata.category(letter).startswith(("P", "C", "Z")) or letter == " "


def is_unspaced(text: str) -> bool:
    """Whether most of a text is of a script without spaces between words."""
    letters = [letter for letter in text if letter.isalpha()]
    return bool(letters) and sum(map(bool, map(UNSPACED.match, letters))) > UNSPACED_SHARE * len(letters)


def words_of(text: str, by_characters: bool) -> list[str]:
    """The words of a normalised text; its characters where it has no spaces."""
    return list(text.replace(" ", "")) if by_characters else text.split()


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Word errors of one utterance; of its characters where the reference is of a script without spaces."""
    said, written = normalise(reference), normalise(hypothesis)
    by_characters = is_unspaced(said)
    return _errors(words_of(said, by_characters), words_of(written, by_characters))


def character_errors(reference: str, hypothesis: str) -> Errors:
    """Character errors of one utterance; spaces count, but in scripts without them."""
    said, written = normalise(reference), normalise(hypothesis)
    if is_unspaced(said):
        said, written = said.replace(" ", ""), written.replace(" ", "")
    return _errors(list(said), list(written))


def _errors(said: list[str], written: list[str]) -> Errors:
    """The fewest edits that make one list of units the other."""
    if not said or not written:  # jiwer takes no empty references
        return Errors(0, len(said), len(written), len(said))
    numbers = {unit: f"u{index}" for index, unit in enumerate(dict.fromkeys([*said, *written]))}
    lines = [" ".join(numbers[unit] for unit in units) for units in (said, written)]
    found = require_package("jiwer").process_words(*lines)
    return Errors(found.substitutions, found.deletions, found.insertions, len(said))


def string_matches(reference: str, hypothesis: str) -> bool:
    """Whether either text contains the other, as answers to questions are judged; an empty one matches an empty one."""
    said, written = normalise(reference), normalise(hypothesis)
    if not said or not written:
        return said == written
    return said in written or written in said


def pooled(pairs: Sequence[Pair]) -> dict[str, float]:
    """Word and character error rates of a corpus, and the share of strings that match."""
    words = sum((word_errors(pair.reference, pair.hypothesis) for pair in pairs), NONE)
    characters = sum((character_errors(pair.reference, pair.hypothesis) for pair in pairs), NONE)
    matches = sum(string_matches(pair.reference, pair.hypothesis) for pair in pairs)
    return {"wer": words.rate, "cer": characters.rate, "string_accuracy": matches / max(1, len(pairs))}


def worst(pairs: Sequence[Pair], most: int) -> list[dict[str, Any]]:
    """Utterances with errors, those with the most first, of equal ones those with the higher rate."""
    found = [(word_errors(pair.reference, pair.hypothesis), pair) for pair in pairs]
    wrong = sorted(
        ((errors, pair) for errors, pair in found if errors.count),
        key=lambda item: (-item[0].count, -item[0].rate, item[1].audio),
    )
    return [{**asdict(pair), "errors": errors.count, "words": errors.units} for errors, pair in wrong[:most]]
