"""Cut a stream of text into documents: WikiText lines into articles, long texts into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from modularforge.errors import DataError

TEXT_PIECE_CHARACTERS = 1 << 16
# Longer ones mean that the text is not WikiText.
ARTICLE_CHARACTERS = 1 << 24


def split_articles(lines: Iterable[str], origin: str) -> Iterator[str]:
    """Cut WikiText lines at level-one headings; what precedes the first heading is an article of its own.

    A heading stands between empty lines: WikiText also has body lines such as ` = Played , W = `, cut out of tables.
    """
    article: list[str] = []
    characters, previous_is_blank = 0, True
    for line, next_is_blank in _with_next_blank(lines):
        if previous_is_blank and next_is_blank and _is_heading(line):
            yield from _whole_article(article)
            article, characters = [], 0
        article.append(line)
        characters += len(line)
        if characters > ARTICLE_CHARACTERS:
            raise DataError(
                f"{origin} must have level-one headings such as ` = Title = ` in WikiText format, "
                f"but has an article of over {ARTICLE_CHARACTERS} characters; set format: text for this source"
            )
        previous_is_blank = not line.strip()
    yield from _whole_article(article)


def split_pieces(chunks: Iterable[str], limit: int = TEXT_PIECE_CHARACTERS, least: int = 1) -> Iterator[str]:
    """Cut a long text into pieces of at most `limit` characters, after the last blank line, line or word that fits.

    Of short pieces a `least` length keeps one from ending behind a heading.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > limit:
            end = _last_break(text, limit, least)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def _is_heading(line: str) -> bool:
    """One equals sign on each side: ` = = Section = = ` has more and belongs to its article."""
    title = line.strip()
    is_enclosed = len(title) > 4 and title.startswith("= ") and title.endswith(" =")
    return is_enclosed and not title.startswith("= =") and not title.endswith("= =")


def _with_next_blank(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each line with whether the one after it is empty; the end of the file counts as empty."""
    iterator = iter(lines)
    line = next(iterator, None)
    for following in iterator:
        assert line is not None
        yield line, not following.strip()
        line = following
    if line is not None:
        yield line, True


def _whole_article(lines: list[str]) -> Iterator[str]:
    if any(line.strip() for line in lines):
        yield "\n".join(lines) + "\n"


def _last_break(text: str, limit: int, least: int) -> int:
    for separator in ("\n\n", "\n", " "):
        if (found := text.rfind(separator, least, limit)) > 0:
            return found + len(separator)
    return limit
