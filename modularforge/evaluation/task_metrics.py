"""How good replies are, held against references: BLEU, ROUGE, METEOR, exact match and accuracy; all in per cent.

Each is computed by a well-kept library where there is one (extra `tasks`): sacrebleu, rouge-score, nltk. A reply may
have several references, of one prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import ModuleType
from typing import Any

from modularforge.errors import ConfigError

References = Sequence[Sequence[str]]
Scores = dict[str, float]
ORDERS = (1, 2, 3, 4)
ROUGES = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l", "rougeLsum": "rouge_lsum"}
UNSPOKEN = re.compile(r"(?<=\d),(?=\d)|\$|\.$")  # of an answer such as $1,000.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WITHOUT_WORDNET = (
    "METEOR here knows equal words and equal stems alone: WordNet is not installed, so that synonyms are left out "
    "(python -m nltk.downloader wordnet omw-1.4)"
)


@dataclass(frozen=True)
class Marking:
    """What of a reply counts: one of `labels` for accuracy, what stands behind the last `mark` for exact match."""

    labels: Sequence[str] = ()
    mark: str | None = None


def measure_replies(
    metrics: Iterable[str], replies: Sequence[str], references: References, marking: Marking
) -> tuple[Scores, list[str]]:
    """Each metric over all replies in per cent, by name, and what is to be said of them; ConfigError without a library.

    `references` are those of each reply, at least one.
    """
    scores: Scores = {}
    notes: list[str] = []
    for metric in metrics:
        found, note = METRICS[metric](replies, references, marking)
        scores |= found
        notes += [note] if note else []
    return scores, notes


def check_metrics(metrics: Iterable[str]) -> None:
    """Raise ConfigError when the library of a metric is missing, before models have replied for hours."""
    for metric in metrics:
        if metric in LIBRARIES:
            _library(LIBRARIES[metric], metric)


def bleu(replies: Sequence[str], references: References, _marking: Marking) -> tuple[Scores, str]:
    """Corpus BLEU (Papineni et al., ACL 2002) as sacrebleu computes it (arXiv 1804.08771), and of shorter n-grams."""
    metrics: Any = _library("sacrebleu.metrics", "bleu")
    if not replies:  # of which sacrebleu makes no corpus
        return dict.fromkeys(("bleu", *(f"bleu_{n}" for n in ORDERS)), 0.0), ""
    columns = [list(column) for column in zip_longest(*references)]  # None where a reply has fewer references
    found = {f"bleu_{n}": float(metrics.BLEU(max_ngram_order=n).corpus_score(replies, columns).score) for n in ORDERS}
    return {"bleu": found["bleu_4"], **found}, ""


def rouge(replies: Sequence[str], references: References, _marking: Marking) -> tuple[Scores, str]:
    """Mean F-measure of ROUGE-1, -2, -L and -Lsum with stems (Lin, ACL 2004), each with the best reference."""
    scorer = _library("rouge_score.rouge_scorer", "rouge").RougeScorer(list(ROUGES), use_stemmer=True)
    totals = dict.fromkeys(ROUGES, 0.0)
    for reply, known in zip(replies, references, strict=True):
        found = scorer.score_multi([_lines(text) for text in known], _lines(reply))
        totals = {name: total + found[name].fmeasure for name, total in totals.items()}
    return {ROUGES[name]: _percent(total, len(replies)) for name, total in totals.items()}, ""


def meteor(replies: Sequence[str], references: References, _marking: Marking) -> tuple[Scores, str]:
    """Mean METEOR (Banerjee and Lavie, ACL 2005) of nltk, with the best reference."""
    module = _library("nltk.translate.meteor_score", "meteor")
    wordnet, note = _wordnet()
    words = [re.findall(r"\w+|[^\w\s]", reply) for reply in replies]
    known = [[re.findall(r"\w+|[^\w\s]", text) for text in texts] for texts in references]
    total = sum(module.meteor_score(texts, reply, wordnet=wordnet) for texts, reply in zip(known, words, strict=True))
    return {"meteor": _percent(total, len(replies))}, note


def exact_match(replies: Sequence[str], references: References, marking: Marking) -> tuple[Scores, str]:
    """Share of replies that are a reference, case and white space folded.

    What stands behind a mark is compared as answers of GSM8K are: without commas in numbers, $, and a full stop.
    """
    mine = [_marked(reply, marking.mark) for reply in replies]
    wanted = [{_marked(text, marking.mark) for text in known} for known in references]
    right = sum(reply in known for reply, known in zip(mine, wanted, strict=True))
    return {"exact_match": _percent(right, len(replies))}, ""


def accuracy(replies: Sequence[str], references: References, marking: Marking) -> tuple[Scores, str]:
    """Share of replies whose label is a reference; a reply's is the longest that it begins with, or none."""
    labels = [fold(label) for label in marking.labels] or [fold(text) for known in references for text in known]
    pairs = zip(replies, references, strict=True)
    right = sum(label_of(reply, labels) in {fold(text) for text in known} for reply, known in pairs)
    return {"accuracy": _percent(right, len(replies))}, ""


METRICS: Mapping[str, Callable[[Sequence[str], References, Marking], tuple[Scores, str]]] = {
    "bleu": bleu,
    "rouge": rouge,
    "meteor": meteor,
    "exact_match": exact_match,
    "accuracy": accuracy,
}
LIBRARIES = {"bleu": "sacrebleu.metrics", "rouge": "rouge_score.rouge_scorer", "meteor": "nltk.translate.meteor_score"}


def fold(text: str) -> str:
    """A text in small letters, with single blanks."""
    return " ".join(text.casefold().split())


def label_of(reply: str, labels: Iterable[str]) -> str | None:
    """The longest label (folded) that a reply begins with and ends or goes on behind as another word; None for none."""
    words = fold(reply)
    found = [label for label in labels if words.startswith(label) and not words[len(label) : len(label) + 1].isalnum()]
    return max(found, key=len, default=None)


def _marked(text: str, mark: str | None) -> str:
    """What of a text is compared."""
    return fold(text) if mark is None else UNSPOKEN.sub("", fold(text.rsplit(mark, 1)[-1]))


def _lines(text: str) -> str:
    """A sentence a line, as ROUGE-Lsum wants it."""
    return "\n".join(SENTENCE_END.split(text.strip()))


def _percent(total: float, count: int) -> float:
    return 100.0 * float(total) / max(1, count)


class _NoWordNet:
    """A WordNet in which no word has synonyms."""

    def synsets(self, _word: str) -> list[Any]:
        """Groups of synonyms of a word."""
        return []


def _wordnet() -> tuple[Any, str]:
    """nltk's WordNet, or one that is empty and what to say of it."""
    corpora = _library("nltk.corpus", "meteor")
    try:
        corpora.wordnet.synsets("word")
        return corpora.wordnet, ""
    except LookupError:
        return _NoWordNet(), WITHOUT_WORDNET


def _library(module: str, metric: str) -> Any:
    from importlib import import_module

    try:
        found: ModuleType = import_module(module)
        return found
    except ImportError as error:
        name = module.split(".")[0].replace("_", "-")
        raise ConfigError(
            f"evaluation.tasks measures {metric}, which needs {name}, but that is not installed; run pip install "
            "'modularforge[tasks]', or leave that metric out"
        ) from error
