"""Error rates against examples that were counted by hand."""

from __future__ import annotations

import math

import pytest

from modularforge.speech.metrics import (
    Errors,
    Pair,
    character_errors,
    is_unspaced,
    normalise,
    pooled,
    string_matches,
    word_errors,
    worst,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "words", "characters"),
    [
        ("the cat sat", "the cat sat", Errors(0, 0, 0, 3), Errors(0, 0, 0, 11)),
        ("the cat sat", "the bat sat", Errors(1, 0, 0, 3), Errors(1, 0, 0, 11)),
        ("the cat sat", "the sat", Errors(0, 1, 0, 3), Errors(0, 4, 0, 11)),
        ("the cat", "the black cat", Errors(0, 0, 1, 2), Errors(0, 0, 6, 7)),
        ("The cat, sat.", "the cat sat", Errors(0, 0, 0, 3), Errors(0, 0, 0, 11)),
        ("", "", Errors(0, 0, 0, 0), Errors(0, 0, 0, 0)),
        ("", "oh no", Errors(0, 0, 2, 0), Errors(0, 0, 5, 0)),
        ("oh no", "", Errors(0, 2, 0, 2), Errors(0, 5, 0, 5)),
        ("饲料", "饲科", Errors(1, 0, 0, 2), Errors(1, 0, 0, 2)),
        ("你好 世界", "你好世界", Errors(0, 0, 0, 4), Errors(0, 0, 0, 4)),
        ("你好世界", "你世", Errors(0, 2, 0, 4), Errors(0, 2, 0, 4)),
    ],
)
def test_errors_are_those_counted_by_hand(reference: str, hypothesis: str, words: Errors, characters: Errors) -> None:
    assert word_errors(reference, hypothesis) == words
    assert character_errors(reference, hypothesis) == characters


def test_rates_are_pooled_over_the_corpus() -> None:
    # 1 of 4 words and 0 of 1 are wrong: pooled 1/5, and not the mean of 1/4 and 0.
    pairs = [Pair("one two three four", "one two tree four"), Pair("five", "five")]
    found = pooled(pairs)
    assert found["wer"] == pytest.approx(1 / 5)
    assert found["cer"] == pytest.approx(1 / 22)
    assert found["string_accuracy"] == 0.5


def test_rates_of_empty_references_are_defined() -> None:
    assert pooled([Pair("", "")])["wer"] == 0.0
    assert pooled([Pair("", "word")])["wer"] == math.inf
    assert pooled([Pair("", "word"), Pair("one two", "one two")])["wer"] == 0.5
    assert pooled([])["wer"] == 0.0


def test_strings_match_where_either_contains_the_other() -> None:
    assert string_matches("Paris", "The capital is Paris.")
    assert string_matches("a large latte", "latte")
    assert not string_matches("Paris", "Rome")
    assert not string_matches("Paris", "")
    assert string_matches("", "...")


def test_what_is_compared_has_no_case_and_no_punctuation() -> None:
    assert normalise("It's  “fine”, he said — O.K.!") == "it's fine he said o k"
    assert normalise("１２ Äpfel\n") == "12 äpfel"
    assert is_unspaced("你好 ok 世界")
    assert not is_unspaced("hello 你")


def test_the_worst_utterances_are_listed_first_and_right_ones_not_at_all() -> None:
    pairs = [Pair("a b c", "a b c", "1.wav"), Pair("a b c", "x y c", "2.wav"), Pair("d", "e", "3.wav", 0.5)]
    found = worst(pairs, 5)
    assert [row["audio"] for row in found] == ["2.wav", "3.wav"]
    assert found[1] == {
        "reference": "d", "hypothesis": "e", "audio": "3.wav", "seconds": 0.5, "errors": 1, "words": 1,
    }  # fmt: skip
    assert worst(pairs, 1) == found[:1]
