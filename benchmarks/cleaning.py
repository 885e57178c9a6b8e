"""What each step of cleaning finds of planted faults, and its speed beside datatrove's own step on the same texts.

    python -m benchmarks.cleaning [--faults 40 | 0] [--rounds 2]    # extra benchmarks

Faults are planted one kind at a time among clean documents of the package's sample: copies of which 100, 90, 80 and
50 % of the words are the original's (the rest those of another document), French, boilerplate, and mojibake. Recall is
the share of planted documents that the step dropped, or repaired to the very original; precision the share of planted
ones among all that it dropped or changed. Speeds are megabytes per second of processor time of one core, with the same
splitter of words: ours from files to files, and datatrove's with its reader and writer, and on a list of documents; the
best of some rounds in alternation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modularforge.config import CleanStepConfig, Config, DataConfig, SourceConfig
from modularforge.data import cleaning
from modularforge.data.clean_shards import read_cleaned
from modularforge.data.clean_steps import datatrove, hashing, make_steps, words_of
from modularforge.data.cleaning import clean_corpus
from modularforge.data.files import find_files
from modularforge.data.formats import read_file

DOMAINS = ("law", "english_novels", "standards")
CHARACTERS = 4000
COPIES = 5  # of the clean documents, where speed is measured
ENGLISH = {"languages": ["en"]}
MENU = ("Home", "About us", "Contact", "Sign in", "Subscribe to our newsletter", "Share on social media")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=40, help="documents planted of each kind; 0 measures speed alone")
    parser.add_argument("--rounds", type=int, default=2, help="of each speed, of which the best counts")
    arguments = parser.parse_args()
    count = arguments.faults
    logging.disable()
    vars(cleaning)["cores"] = lambda: 1
    clean = [text for domain in DOMAINS for text in texts_of(domain)]
    print(f"{len(clean)} clean documents, {count} planted of each kind\n")
    print("| fault | step | recall | precision |\n|---|---|---|---|")
    for fault, step, options, planted in faults(clean, count) if count else ():
        found, right = findings(clean, planted, step, options)
        print(f"| {fault} | `{step}` | {right / count:.2f} | {f'{right / found:.2f}' if found else '–'} |", flush=True)
    texts = [f"{text} {number}" for number in range(COPIES) for text in clean]
    titles = ["step", "MB/s of a core", "datatrove, with files", "ratio", "its step alone", "ratio"]
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for step in ("repair", "repetition", "gopher", "c4", "fineweb", "personal", "near"):
        speed(clean[:9], step), speed_alone(clean[:9], step, True)  # what is imported once is not measured
        rounds = [
            (speed(texts, step), speed_alone(texts, step, True), speed_alone(texts, step, False))
            for _ in range(arguments.rounds)
        ]
        ours, files, alone = map(max, zip(*rounds, strict=True))
        print(
            f"| `{step}` | {ours:.2f} | {files:.2f} | {ours / files:.2f} | {alone:.2f} | {ours / alone:.2f} |",
            flush=True,
        )


def texts_of(domain: str) -> list[str]:
    source = SourceConfig(name=domain, train=f"sample:{domain}/train.jsonl.gz")
    found = [text for text, _ in read_file(find_files(source.train)[0], source)]
    return [text[at : at + CHARACTERS] for text in found for at in range(0, len(text) - CHARACTERS + 1, CHARACTERS)]


def faults(clean: list[str], count: int) -> Sequence[tuple[str, str, dict[str, Any], dict[str, str]]]:
    """Fault, step, options, and planted texts by themselves, each with what it was made of."""
    chosen = clean[:: len(clean) // count][:count]
    shift = len(clean) // 2
    others = [clean[(clean.index(text) + shift) % len(clean)] for text in chosen]

    def copies(share: float) -> dict[str, str]:
        return {mixed(text, other, share): text for text, other in zip(chosen, others, strict=True)}

    french = dict.fromkeys(texts_of("french_novels")[:count], "")
    menus = {"\n".join(MENU[(k + m) % len(MENU)] for m in range(20 + k)): "" for k in range(count)}
    curly = [text.replace("'", "’").replace("the ", "thé ") for text in chosen]
    broken = {text.encode().decode("cp1252", errors="replace"): text for text in curly}
    near: list[Any] = [(f"copy, {share:.0%} of its words", "near", {}, copies(share)) for share in (1.0, 0.9, 0.8, 0.5)]
    return [
        ("copy, 100% of its words", "exact", {}, {f"{text}": text for text in chosen}),
        *near,
        ("French", "language", ENGLISH, french),
        *(("boilerplate", step, {}, menus) for step in ("repetition", "gopher", "c4", "fineweb")),
        ("mojibake", "repair", {}, broken),
    ]


def mixed(text: str, other: str, share: float) -> str:
    """A share of the words of one text, from its beginning, then those of another."""
    words = text.split(" ")
    kept = round(len(words) * share)
    return " ".join([*words[:kept], *other.split(" ")[: len(words) - kept]])


def findings(clean: list[str], planted: dict[str, str], step: str, options: dict[str, Any]) -> tuple[int, int]:
    """How many documents the step dropped or changed, and how many of the planted ones."""
    with tempfile.TemporaryDirectory() as folder:
        report = cleaned(Path(folder), [*clean, *planted], step, options)
        left = [document.text for document in read_cleaned(Path(folder) / "output", 0, "train")]
    row = report["counts"][0]
    if step == "repair":
        return row["changed"], len(set(planted.values()) & set(left[len(clean) :]))
    if planted.keys() <= set(clean):
        return row["dropped"], sum(left.count(text) < 2 for text in planted)
    return row["dropped"], sum(text not in left for text in planted)


def cleaned(folder: Path, texts: list[str], step: str, options: dict[str, Any]) -> dict[str, Any]:
    return clean_corpus(written(folder, texts, step, options), folder / "scratch", folder / "output")


def written(folder: Path, texts: list[str], step: str, options: dict[str, Any]) -> Config:
    """The files of a corpus, and the settings that clean it."""
    held_out = texts_of("english_novels")[-2:]
    files = {"train": texts, "validation": [f"{held_out[0]} held out"], "test": [f"{held_out[1]} held out"]}
    for name, found in files.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    source = {"name": "all", **{name: str(folder / f"{name}.jsonl") for name in files}}
    (folder / "output").mkdir()
    return Config(data=DataConfig.model_validate({"sources": [source], "clean": [{"step": step, "options": options}]}))


def speed(texts: list[str], step: str) -> float:
    """Megabytes per second of processor time, from files to files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = written(folder, texts, step, {})
        return measured(texts, lambda: clean_corpus(config, folder / "scratch", folder / "output"))


def speed_alone(texts: list[str], step: str, with_files: bool) -> float:
    """The same of datatrove's step by itself, on a list of documents, or with its own reader and writer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, texts, step, {})
        make, readers, writers = (datatrove(part) for part in ("data", "pipeline.readers", "pipeline.writers"))
        documents: Any = [make.Document(text, "") for text in texts]
        write = contextlib.nullcontext(list[Any]())
        if with_files:
            documents = readers.JsonlReader(name, glob_pattern="train.jsonl").run(None, 0, 1)
            write = writers.JsonlWriter(f"{name}/kept", compression="zstd")
        found = passed if step != "near" else partial(deduplicated, folder=name)
        return measured(texts, lambda: stored(found(documents, step), write))


def stored(documents: Iterable[Any], target: Any) -> None:
    with target as writer:
        for document in documents:
            (writer.append if isinstance(writer, list) else writer.write)(document)


def passed(documents: Iterable[Any], step: str) -> Iterator[Any]:
    apply = make_steps([CleanStepConfig.model_validate({"step": step})], Path(), None)[0]
    return (document for document in documents if apply(document) is None)


def deduplicated(documents: Iterable[Any], step: str, folder: str) -> Iterator[Any]:
    """datatrove's four steps, as its examples have them."""
    documents = list(documents)
    module = datatrove("pipeline.dedup.minhash")
    config = module.MinhashConfig(hash_config=hashing())
    module.MinhashDedupSignature(f"{folder}/signatures", config, words_of({})).run(iter(documents))
    for bucket in range(config.num_buckets):
        finder = module.MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/pairs", config=config)
        finder.run(None, bucket, config.num_buckets)
    module.MinhashDedupCluster(f"{folder}/pairs", f"{folder}/remove", config).run(None, 0, 1)
    found: Iterator[Any] = module.MinhashDedupFilter(f"{folder}/remove").run(iter(documents))
    return found


def measured(texts: list[str], call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.process_time() - start)


if __name__ == "__main__":
    main()
