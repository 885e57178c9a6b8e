"""Speed of tokenising: prepare_corpus end to end against a bare `tokenizer.encode_batch` loop over the same texts.

    python benchmarks/tokenise.py [CORPUS.jsonl.gz …] [--copies 4] [--rounds 5]

The end-to-end number reads, decompresses and parses the files, tokenises, and writes shards and token files. The bare
loop has its texts in memory. Both run on all cores; the claim is a ratio of at least 0.8. What counts is the best
of several rounds of each: on a machine that others use as well, it is the round they disturbed least.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modularforge.config import Config, DataConfig, SourceConfig
from modularforge.data.corpus import read_documents
from modularforge.data.files import find_files
from modularforge.data.prepare import prepare_corpus
from modularforge.data.tokenizer import load_tokenizer

DOMAINS = ("law", "english_novels", "french_novels", "standards", "c_code")
BATCH_DOCUMENTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="*", help="training files; default: the sample corpus of the package")
    parser.add_argument("--copies", type=int, default=4, help="read every file this many times")
    parser.add_argument("--rounds", type=int, default=5, help="measure this often and take the best")
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(arguments.corpus or samples(), arguments.copies, Path(folder))
        measure(config, Path(folder), arguments.rounds)


def samples() -> list[str]:
    return [find_files(f"sample:{name}/train.jsonl.gz")[0] for name in DOMAINS]


def make_config(files: list[str], copies: int, folder: Path) -> Config:
    """Copies, because a corpus reads each of its files once."""
    train = [
        str(folder / f"{copy}-{place}-{Path(file).name}") for copy in range(copies) for place, file in enumerate(files)
    ]
    for target, file in zip(train, files * copies, strict=True):
        shutil.copyfile(file, target)
    source = SourceConfig(name="corpus", train=train, validation=files[:1], test=files[:1])
    return Config(data=DataConfig(sources=[source], vocab_size=16384, tokenizer_sample_bytes=4_000_000))


def measure(config: Config, folder: Path, rounds: int) -> None:
    tokenizer, whole_megabytes = learn_once(config, folder)
    texts = [document.text for document in read_documents(config.data.sources[0], "train", config.data)]
    bare_megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{bare_megabytes:.1f} MB in {len(texts)} documents")
    bare_speeds, whole_speeds = [], []
    for _ in range(rounds):
        bare_speeds.append(bare_megabytes / seconds(bare_loop, tokenizer, texts))
        whole_speeds.append(whole_megabytes / seconds(end_to_end, config, folder))
        print(f"bare encode_batch {bare_speeds[-1]:6.2f} MB/s   prepare_corpus {whole_speeds[-1]:6.2f} MB/s")
    bare, whole = max(bare_speeds), max(whole_speeds)
    print(f"best of {rounds}: {whole:.2f} / {bare:.2f} = {whole / bare:.2f} (target: at least 0.8)")


def seconds(work: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def learn_once(config: Config, folder: Path) -> tuple[Tokenizer, float]:
    """Leave a tokenizer in the scratch folder, because learning it is not what is measured; also MB of all splits."""
    (folder / "output").mkdir()
    metadata = prepare_corpus(config, folder / "scratch", folder / "output")
    rows = [row for split in metadata["splits"].values() for row in split.values()]
    return load_tokenizer(folder / "output"), sum(row["bytes"] for row in rows) / 1e6


def bare_loop(tokenizer: Tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokenizer.encode_batch(texts[start : start + BATCH_DOCUMENTS])


def end_to_end(config: Config, folder: Path) -> None:
    """prepare_corpus with its tokenizer but without the shards of an earlier round."""
    for shard in (folder / "scratch").glob("prepare-*/*.npz"):
        shard.unlink()
    shutil.rmtree(folder / "output")
    (folder / "output").mkdir()
    prepare_corpus(config, folder / "scratch", folder / "output")


if __name__ == "__main__":
    main()
