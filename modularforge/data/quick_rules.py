"""datatrove's rules without some of their work that changes nothing: what they say of a text stays the same.

What is spared is counting for reports that nobody reads, and looking in a text for what plainly is not in it.
`tests/unit/test_quick_rules.py` holds each against datatrove's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# A line of ASCII without signs of HTML and control characters is nothing that ftfy changes, with any of its settings.
OTHER_LINE = re.compile(r"^[\t -%'-;=-~]*[^\t\n -%'-;=-~][^\n]*\n?", re.MULTILINE)


def quick(step: str, rule: Any) -> Any:
    """The rule of this step, made quick."""
    rule.stat_update = _not_counted  # c4 counts each line twice
    if step in _CHANGES:
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


def _fineweb(rule: Any) -> None:
    """Of the 170 signs that may end a line, each line is compared with those that do end one of the text."""
    signs, whole = frozenset(rule.stop_chars), rule.filter
    if any(len(sign) != 1 for sign in signs):
        return

    def found(document: Any) -> Any:
        rule.stop_chars = tuple(signs.intersection(line[-1:] for line in document.text.split("\n")))
        return whole(document)

    rule.filter = found


_CHANGES: dict[str, Callable[[Any], None]] = {"repair": _repair, "personal": _personal, "fineweb": _fineweb}
