"""Rules without their needless work say of every text what datatrove's own say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modularforge.data.clean_steps import FILTERS, FORMATTERS, datatrove, words_of
from modularforge.data.quick_rules import quick
from tests.unit.test_cleaning import prose

PIECES = (
    "the ferry left", "The caf\u00c3\u00a9", "na\u00efve", "&amp;", "&lt;b&gt;", "<br>", "&hellip;", "&#10;", "\n",
    "\n", "\n\n", "\r\n",
    "\x1b[31m", "\x07", "\x7f", "\u201cquoted\u201d", "\u00e2\u20ac\u0153", "\ufb01ne", "\uff21\uff22", "\u2028",
    "\x85", "\t", " ", ".", "!",
    "\u3002", "\u061f", "{", "javascript", "lorem ipsum", "Use of cookies.", "jane@company.org", "a@b", "@",
    "8.8.4.4", "10.0.0.1",
    "1.2.3", "Why not?", "It is so \u2014 or not.", "''", "word " * 12 + "end.",
)  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "repair": [
        {},
        {"unescape_html": True},
        {"unescape_html": False, "normalization": "NFKC"},
        {"uncurl_quotes": True, "fix_line_breaks": True, "fix_latin_ligatures": True, "fix_character_width": True},
        {"fix_encoding": False, "remove_control_chars": False, "remove_terminal_escapes": False},
    ],
    "personal": [{}, {"remove_emails": False}, {"email_replacement": "nobody"}],
    "fineweb": [
        {},
        {"line_punct_thr": 0.0, "short_line_thr": 0.99, "char_duplicates_ratio": 1.0, "new_line_ratio": 0.07},
    ],
    "c4": [{}, {"min_num_sentences": 1}, {"max_word_length": 9, "min_num_sentences": 2, "split_paragraph": False}],
    "gopher": [
        {},
        {"min_doc_words": 1, "max_avg_word_length": 0, "min_avg_word_length": 0},
        {"max_non_alpha_words_ratio": 0.5},
    ],
    "repetition": [{}],
}


def texts() -> list[str]:
    generator = np.random.default_rng(5)
    drawn = ["".join(generator.choice(PIECES, size)) for size in generator.integers(1, 40, 150)]
    return [*drawn, *(f"{prose(k)}\n{text}\n{prose(k + 1)}" for k, text in enumerate(drawn[:40])), "\n", "a"]


def rules(step: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """datatrove's own, and ours."""
    room, places = ("filters", FILTERS) if step in FILTERS else ("formatters", FORMATTERS)
    module, _, name = places[step].partition(":")
    maker = getattr(datatrove(f"pipeline.{room}.{module}"), name)
    words = {"language": words_of({})} if step in FILTERS else {}
    return maker(**options, **words), quick(step, maker(**options, **words))


def result(rule: Any, text: str) -> Any:
    """What a rule says of a text and makes of it, or the error that it breaks with."""
    document = datatrove("data").Document(text, "")
    try:
        return (rule.filter(document), document.text) if hasattr(rule, "filter") else rule.format(text)
    except ZeroDivisionError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("step", OPTIONS)
def test_a_quick_rule_says_what_datatroves_own_says(step: str) -> None:
    for options in OPTIONS[step]:
        own, ours = rules(step, options)
        found = [(result(own, text), result(ours, text)) for text in texts()]
        assert all(theirs == mine for theirs, mine in found)
        assert len({str(theirs) for theirs, _ in found}) > 1


def test_what_separates_our_words_separates_parts_too() -> None:
    signs = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000))))
    blanks = set(signs).difference(*words_of({}).word_tokenize(signs))
    assert len(blanks) > 10
    assert all(sign.isspace() for sign in blanks)


def test_a_line_that_is_longer_than_ftfy_looks_at_once_is_repaired_as_by_ftfy() -> None:
    own, ours = rules("repair", {})
    for rule in own, ours:
        rule.config = rule.config._replace(max_decode_length=20)
    for text in ("a &amp; b " * 9 + "\u00c3\u00a9 &amp; <b> " * 9 + "\n&amp;", "x" * 50, *texts()):
        assert ours.format(text) == own.format(text)
