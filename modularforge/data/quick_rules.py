"""datatrove's rules without some of their work that changes nothing: what they say of a text stays the same.

What is spared is counting for reports that nobody reads, and looking in a text for what plainly is not in it.
`tests/unit/test_quick_rules.py` holds each against datatrove's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

# A line of ASCII without signs of HTML and control characters is nothing that ftfy changes, with any of its settings.
OTHER_LINE = re.compile(r"^[\t -%'-;=-~]*[^\t\n -%'-;=-~][^\n]*\n?", re.MULTILINE)


def quick(step: str, rule: Any, has_plain_words: bool = True) -> Any:
    """The rule of this step, made quick; with `has_plain_words`, it splits text as `clean_steps` does by itself."""
    rule.stat_update = _not_counted  # c4 counts each line twice
    if step in _CHANGES and (has_plain_words or step != "fineweb"):  # a language may join what blanks separate
        _CHANGES[step](rule)
    return rule


def _not_counted(*names: str, **values: Any) -> None:
    pass


def _repair(rule: Any) -> None:
    """ftfy takes lines one by one; once one has a `<`, it leaves HTML's entities alone in it and behind it."""
    import ftfy

    def repaired(text: str) -> str:
        config = rule.config

        def line(match: re.Match[str]) -> str:
            nonlocal config
            fixed: str = ftfy.fix_text(match[0], config)
            if config.unescape_html == "auto" and "<" in match[0]:
                config = config._replace(unescape_html=False)
            return fixed

        return OTHER_LINE.sub(line, text)

    rule.format = repaired


def _personal(rule: Any) -> None:
    """The pattern of e-mail addresses tries every word; an address has an @."""
    replace: Callable[[str], str] = rule.emails_replacer.replace
    rule.emails_replacer.replace = lambda text: replace(text) if "@" in text else text


def _gopher(rule: Any) -> None:
    """Letters are looked for in each word in Python: only where words of nothing but letters are too few."""
    share, whole = rule.max_non_alpha_words_ratio, rule.filter
    split = import_module("datatrove.utils.text").split_into_words  # which remembers the last texts

    def found(document: Any) -> Any:
        words = split(document.text, rule.language)
        is_enough = share and words and sum(map(str.isalpha, words)) / len(words) >= share
        rule.max_non_alpha_words_ratio = 0 if is_enough else share
        return whole(document)

    rule.filter = found


def _c4(rule: Any) -> None:
    """Each word of each line is measured in Python, to find one that is too long: only where the text has one."""
    limit, whole = rule.max_word_length, rule.filter

    def found(document: Any) -> Any:
        rule.max_word_length = -1 if max(map(len, document.text.split()), default=0) <= limit else limit
        return whole(document)

    rule.filter = found


def _fineweb(rule: Any) -> None:
    """Words are split to count them, beside the line ends: only where what blanks separate is too little of them."""
    words, line_ends_a_word = rule.language, rule.new_line_ratio

    class EnoughWords(type(words)):  # type: ignore[misc]
        """Words of a text; or the parts between blanks, each of which has a word, where already these are enough."""

        def word_tokenize(self, text: str) -> list[str]:
            parts = text.split()
            if parts and text.count("\n") / len(parts) <= line_ends_a_word:
                return parts
            found: list[str] = words.word_tokenize(text)
            return found

    rule.language = EnoughWords()


_CHANGES: dict[str, Callable[[Any], None]] = {
    "repair": _repair,
    "personal": _personal,
    "gopher": _gopher,
    "c4": _c4,
    "fineweb": _fineweb,
}
