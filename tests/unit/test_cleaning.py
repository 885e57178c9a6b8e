"""Cleaning: what each step finds, which copy stays, what a killed run repeats, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularforge.config import CleanStepConfig, Config
from modularforge.data import cleaning, duplicates, shards
from modularforge.data.clean_shards import clean_shard, read_cleaned, records
from modularforge.data.clean_steps import datatrove, make_steps, words_of
from modularforge.data.cleaning import clean_corpus
from modularforge.errors import ConfigError, DataError

WORDS = [
    "the", "a", "of", "and", "to", "in", "is", "was", "that", "for", "it", "with", "as", "his", "on", "be", "at",
    "by", "had", "not", "are", "but", "from", "or", "have", "they", "you", "which", "one", "were", "ship", "harbour",
    "captain", "storm", "island", "letter", "window", "morning", "garden", "river", "mountain", "road", "horse",
    "evening", "lamp", "table", "winter",
]  # fmt: skip
SPLITS = ("train", "validation", "test")


def prose(seed: int, sentences: int = 12) -> str:
    """English of a kind: sentences of ten words, all different by the seed."""
    generator = np.random.default_rng(seed)
    lines = [" ".join(generator.choice(WORDS, 10)).capitalize() + "." for _ in range(sentences)]
    return "\n".join(lines)


PLAIN = {"train": [prose(k) for k in range(6)], "validation": [prose(10)], "test": [prose(20)]}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "cores", lambda: 1)


def config_of(folder: Path, texts: dict[str, dict[str, list[str]]], *steps: str | dict[str, Any]) -> Config:
    """A config of sources with these texts by split."""
    sources = []
    for name, splits in texts.items():
        source = {"name": name}
        for split in SPLITS:
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in splits[split]), encoding="utf-8")
            source[split] = str(path)
        sources.append(source)
    clean = [{"step": step} if isinstance(step, str) else step for step in steps]
    return Config.model_validate({"data": {"sources": sources, "clean": clean, "min_article_length": 10}})


def cleaned(folder: Path, config: Config, name: str = "output") -> dict[str, Any]:
    (folder / name).mkdir()
    return clean_corpus(config, folder / "scratch", folder / name)


def kept(folder: Path, source: int = 0, split: Any = "train") -> list[str]:
    return [document.text for document in read_cleaned(folder / "output", source, split)]


def step_of(report: dict[str, Any], step: str, source: str = "novels") -> dict[str, Any]:
    return next(row for row in report["counts"] if row["step"] == step and row["source"] == source)


MOJIBAKE = "The caf\u00c3\u00a9 was na\u00c3\u00afve. " + prose(31)
FRENCH = "Le navire quitta le port au matin, et personne ne savait où il allait ni quand il reviendrait. " * 4
DROPPED = {
    "length": ({"min_words": 50}, "Too short, all of this.", "too short"),
    "repetition": ({}, "Click here to subscribe now.\n" * 30, "dup_line_frac"),
    "gopher": ({}, "# # # # ... ## 12 34 55 66 77\n" * 30, "gopher"),
    "c4": ({}, "lorem ipsum dolor sit amet is filler text.\n" + prose(33), "lorem_ipsum"),
    "fineweb": ({}, "\n".join(f"menu item {k}" for k in range(40)), "line_punct_ratio"),
    "language": ({"languages": ["en"], "threshold": 0.0}, FRENCH, "fr"),
}


@pytest.mark.parametrize("step", DROPPED)
def test_a_step_drops_what_it_is_for_and_says_why(tmp_path: Path, step: str) -> None:
    options, bad, reason = DROPPED[step]
    texts = {"novels": {**PLAIN, "train": [PLAIN["train"][0], bad, *PLAIN["train"][1:]]}}
    report = cleaned(tmp_path, config_of(tmp_path, texts, {"step": step, "options": options}))
    assert kept(tmp_path) == PLAIN["train"]
    row = step_of(report, step)
    assert (row["documents"], row["dropped"], row["dropped_bytes"]) == (9, 1, len(bad.encode()))
    assert all(reason in found for found in row["reasons"])
    assert [(sample["before"], sample["after"]) for sample in report["samples"]] == [(bad[:600], None)]


def test_characters_are_repaired_and_personal_data_replaced(tmp_path: Path) -> None:
    mail = "Write to jane.doe@company.org from 8.8.4.4. " + prose(32)
    texts = {"novels": {**PLAIN, "train": [MOJIBAKE, mail]}}
    report = cleaned(tmp_path, config_of(tmp_path, texts, "repair", "personal"))
    repaired, replaced = kept(tmp_path)
    assert repaired.startswith("The café was naïve. ")
    assert replaced.startswith("Write to email@example.com")
    assert not any(secret in replaced for secret in ("jane", "8.8.4.4"))
    assert [step_of(report, step)["changed"] for step in ("repair", "personal")] == [1, 1]
    assert [sample["after"][:9] for sample in report["samples"]] == ["The café ", "Write to "]


def test_a_step_looks_only_at_the_sources_that_it_names(tmp_path: Path) -> None:
    french = {split: [f"{FRENCH} {k} {split}" for k in range(3)] for split in SPLITS}
    step = {"step": "language", "sources": ["novels"], "options": {"languages": ["en"], "threshold": 0.0}}
    report = cleaned(tmp_path, config_of(tmp_path, {"novels": PLAIN, "romans": french}, step))
    assert kept(tmp_path, 1) == french["train"]
    assert step_of(report, "language", "romans")["documents"] == 0


def test_rules_of_n_grams_have_limits_of_their_own(tmp_path: Path) -> None:
    found = []
    for limits in ([[2, 0.5], [3, 0.18]], [[2, 0.001]]):
        step = {"step": "repetition", "options": {"top_n_grams": limits}}
        config = config_of(tmp_path, {"novels": PLAIN}, step)
        (apply,) = make_steps(config.data.clean, tmp_path, "novels").values()
        found.append(apply(datatrove("data").Document(PLAIN["train"][0], "")))
    assert found == [None, "top_2_gram"]


def test_a_rule_that_breaks_on_a_document_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "try_steps", lambda *_: None)
    step = {"step": "fineweb", "options": {"line_punct_thr": None}}
    said = r"step fineweb of data.clean must take every document of test of source novels, but not the one that begi"
    with pytest.raises(DataError, match=said):
        cleaned(tmp_path, config_of(tmp_path, {"novels": PLAIN}, step))


def changed_words(text: str, share: float, seed: int = 0) -> str:
    """The text with a run of its words replaced, so that `share` of them are as they were."""
    words = text.split(" ")
    count = round(len(words) * (1 - share))
    return " ".join([*words[: len(words) - count], *(f"other{seed}w{k}" for k in range(count))])


def test_of_copies_the_held_out_one_stays_then_that_of_the_first_source(tmp_path: Path) -> None:
    """Order of survival: test, validation, training; then sources as the settings have them, then lines."""
    held, shared, own = prose(40), prose(41), prose(42)
    first = {"train": [held, shared, own, own, prose(43)], "validation": [prose(44)], "test": [prose(45), held]}
    second = {"train": [shared, prose(46)], "validation": [held, prose(47)], "test": [prose(48)]}
    report = cleaned(tmp_path, config_of(tmp_path, {"novels": first, "letters": second}, "exact"))
    assert kept(tmp_path) == [shared, own, prose(43)]
    assert kept(tmp_path, 0, "test") == [prose(45), held]
    assert kept(tmp_path, 1) == [prose(46)]
    assert kept(tmp_path, 1, "validation") == [prose(47)]
    assert [step_of(report, "exact", name)["dropped"] for name in ("novels", "letters")] == [2, 2]


def test_no_near_duplicate_of_a_held_out_document_is_left_in_training(tmp_path: Path) -> None:
    held, own = prose(50, 40), prose(51, 40)
    splits = {
        "train": [changed_words(held, 0.97), own, changed_words(own, 0.97), prose(52, 40)],
        "validation": [prose(53, 40)],
        "test": [held],
    }
    report = cleaned(tmp_path, config_of(tmp_path, {"novels": splits}, "near"))
    assert kept(tmp_path) == [own, prose(52, 40)]
    assert kept(tmp_path, 0, "test") == [held]
    assert report["copies"] == [
        {"place": 0, "step": "near", "removed": 2, "shared_with_held_out": 1, "still_shared": 0}
    ]


def test_signatures_are_datatroves_own_whatever_the_script_and_the_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "SHINGLES_AT_ONCE", 50)
    texts = [
        "",
        prose(54),
        "  Ünïted \u0301 naïve cafe\u0301 ệ ",
        "\u0301 שָׁלוֹם عَرَبِيّ हिन्दी ไทย 3 ½ \u2000Ω Å",
        f"{prose(55)} é",
    ]
    for n_grams in (1, 5):
        item = CleanStepConfig(step="near", options={"n_grams": n_grams})
        plain = datatrove("pipeline.dedup.minhash").MinhashDedupSignature(
            str(tmp_path), duplicates.minhash_config(item.options), words_of(item.options)
        )
        ours = duplicates.signer(item, str(tmp_path))
        for text in texts:
            shingles = ours.get_shingles(text)
            assert shingles.tolist() == plain.get_shingles(text).tolist()
            if len(shingles):
                assert ours.get_signature(shingles) == plain.get_signature(shingles)


def test_documents_that_share_words_with_a_given_set_are_dropped(tmp_path: Path) -> None:
    question = "which captain of the seven grey ships left the harbour before the storm began that winter morning"
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": question}) + "\n")
    leaked = f"{prose(60)} {question.upper()}? {prose(61)}"
    options = {"sets": [str(tmp_path / "exam.jsonl")], "text_field": "question", "n_grams": 8}
    texts = {"novels": {**PLAIN, "train": [leaked, *PLAIN["train"]]}}
    report = cleaned(tmp_path, config_of(tmp_path, texts, {"step": "decontaminate", "options": options}))
    assert kept(tmp_path) == PLAIN["train"]
    assert step_of(report, "decontaminate")["reasons"] == {"contaminated": 1}


EVERY_PASS = ("repair", "exact", {"step": "length", "options": {"min_words": 20}}, "near", "repetition")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_cleaning_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    texts = {"novels": {**PLAIN, "train": [*PLAIN["train"], PLAIN["train"][0], changed_words(PLAIN["train"][1], 0.97)]}}
    config = config_of(tmp_path, texts, *EVERY_PASS)
    whole = cleaned(tmp_path, config, "whole")
    (tmp_path / "scratch").rename(tmp_path / "before")
    done: list[Path] = []

    def clean_or_die(*arguments: Any) -> Path:
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(clean_shard(*arguments))
        return done[-1]

    monkeypatch.setattr(cleaning, "clean_shard", clean_or_die)
    with pytest.raises(KeyboardInterrupt):
        cleaned(tmp_path, config, "killed")
    monkeypatch.setattr(cleaning, "clean_shard", clean_shard)
    times = {path: path.stat().st_mtime_ns for path in done}
    assert cleaned(tmp_path, config) == whole
    assert files_of(tmp_path / "output") == files_of(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert sum(row["dropped"] for row in whole["counts"]) == 2


@pytest.mark.slow
def test_several_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, {"novels": PLAIN}, *EVERY_PASS)
    cleaned(tmp_path, config, "one")
    (tmp_path / "scratch").rename(tmp_path / "before")
    monkeypatch.setattr(cleaning, "cores", lambda: 2)
    cleaned(tmp_path, config, "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_files_of_many_shards_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    monkeypatch.setattr(cleaning, "SHARDS_A_FILE", 4)
    cleaned(tmp_path, config_of(tmp_path, {"novels": PLAIN}, "repair"))
    found = sorted((tmp_path / "output" / "documents").glob("train-*"))
    assert [len(list(records(path))) for path in found] == [4, 2]
    assert kept(tmp_path) == PLAIN["train"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an option that it has not": (
        {"step": "repetition", "options": {"dup_lines": 0.3}},
        "must give repetition options that it has (dup_line_frac, .*but gives 'dup_lines'",
    ),
    "a value of another kind": (
        {"step": "repetition", "options": {"dup_line_frac": "much"}},
        "must give repetition a dup_line_frac like 0.3, but gives 'much'",
    ),
    "no bands": ({"step": "near", "options": {"num_buckets": 0}}, "num_buckets that is a whole number of at least 1"),
    "half a hash": ({"step": "near", "options": {"hashes_per_bucket": 1.5}}, "at least 1, but gives 1.5"),
    "runs of no length": ({"step": "near", "options": {"n_grams": None}}, "n_grams that .* at least 1, but gives None"),
    "a seed below zero": ({"step": "near", "options": {"seed": -1}}, "a whole number from 0 to 4294967295"),
    "runs of no words": (
        {"step": "decontaminate", "options": {"sets": ["sample:law/test.jsonl.gz"], "n_grams": 0}},
        "give decontaminate a n_grams that is a whole number of at least 1",
    ),
    "no limit but null": ({"step": "length", "options": {"min_words": None}}, "at least 0, but gives None"),
    "more than sure": (
        {"step": "language", "options": {"languages": ["en"], "threshold": 7}},
        "a number from 0.0 to 1.0, but gives 7",
    ),
    "a language by its name": (
        {"step": "language", "options": {"languages": ["english"]}},
        "languages that the identifier knows, such as en or fr, but gives 'english'",
    ),
    "what a library refuses": (
        {"step": "repair", "options": {"normalization": "none"}},
        r"give repair options that it can work with, .* plain text \(.*normalization.*\); change them \(normalization",
    ),
    "what a rule breaks on": (
        {"step": "repetition", "options": {"dup_n_grams": "abc"}},
        "give repetition options that it can work with, but with these it breaks on a plain text",
    ),
    "no languages": ({"step": "language"}, "must give language the languages to keep"),
    "no sets": ({"step": "decontaminate"}, "must give decontaminate the sets to look for"),
    "a language without words": (
        {"step": "gopher", "options": {"language": "klingon"}},
        "must name a language that datatrove can split into words, but not 'klingon'",
    ),
    "an option of exact": (
        {"step": "exact", "options": {"seed": 1}},
        r"options that it has \(none\), but gives 'seed'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_sentence_before_the_work(tmp_path: Path, case: str) -> None:
    step, said = WRONG[case]
    with pytest.raises(ConfigError, match=said.replace("(dup", r"\(dup")):
        cleaned(tmp_path, config_of(tmp_path, {"novels": PLAIN}, step))


def test_a_source_of_which_nothing_is_left_names_the_step(tmp_path: Path) -> None:
    step = {"step": "length", "options": {"min_words": 5000}}
    with pytest.raises(DataError, match=r"novels must have test documents .* dropped by length: 8 of 8"):
        cleaned(tmp_path, config_of(tmp_path, {"novels": PLAIN}, "repair", step))


def test_steps_that_change_text_come_before_near(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.clean must name near after all steps that change text, but c4"):
        config_of(tmp_path, {"novels": PLAIN}, "near", "c4")
    with pytest.raises(ValueError, match="exact, which looks at the whole corpus"):
        config_of(tmp_path, {"novels": PLAIN}, {"step": "exact", "sources": ["novels"]})
    with pytest.raises(ValueError, match=r"must name data.sources \(novels\), but repair names 'letters'"):
        config_of(tmp_path, {"novels": PLAIN}, {"step": "repair", "sources": ["letters"]})
