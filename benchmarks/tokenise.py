"""Speed of tokenising: prepare_corpus end to end against a bare `tokenizer.encode_batch` loop over the same texts.

    python benchmarks/tokenise.py [CORPUS.jsonl.gz …] [--copies 10] [--rounds 3]

The end-to-end number reads, decompresses and parses the files, tokenises, and writes shards and token files. The bare
loop has its texts in memory. Both run on all cores; the claim is a ratio of at least 0.8. The ratio of CPU times is
printed too: on a machine that others use as well it is the steadier number.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modularforge.config import Config, DataConfig, SourceConfig
from modularforge.data.corpus import read_documents
from modularforge.data.prepare import prepare_corpus
from modularforge.data.tokenizer import load_tokenizer

DOMAINS = ("law", "english_novels", "french_novels", "standards", "c_code")
BATCH_DOCUMENTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="*", help="training files; default: the sample corpus of the package")
    parser.add_argument("--copies", type=int, default=10, help="read every file this many times")
    parser.add_argument("--rounds", type=int, default=3, help="measure this often and take the median")
    arguments = parser.parse_args()
    config = make_config(arguments.corpus or [f"sample:{name}/train.jsonl.gz" for name in DOMAINS], arguments.copies)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        measure(config, Path(folder), arguments.rounds)


def make_config(files: list[str], copies: int) -> Config:
    source = SourceConfig(name="corpus", train=files * copies, validation=files[:1], test=files[:1])
    limits = {"vocab_size": 16384, "tokenizer_sample_bytes": 4_000_000}
    return Config(data=DataConfig(sources=[source], **limits))


def measure(config: Config, folder: Path, rounds: int) -> None:
    tokenizer = learn_once(config, folder)
    texts = [document.text for document in read_documents(config.data.sources[0], "train", config.data)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes:.1f} MB in {len(texts)} documents")
    ratios = []
    for _ in range(rounds):
        bare, whole = timed(bare_loop, tokenizer, texts), timed(end_to_end, config, folder)
        ratios.append((bare[0] / whole[0], bare[1] / whole[1]))
        print(
            f"bare encode_batch {megabytes / bare[0]:6.2f} MB/s   prepare_corpus {megabytes / whole[0]:6.2f} MB/s   "
            f"ratio {ratios[-1][0]:.2f}, of CPU times {ratios[-1][1]:.2f}"
        )
    wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"median ratio {wall:.2f} (target: at least 0.8), of CPU times {cpu:.2f}")


def timed(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a call, over all its threads."""
    started, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - started, time.process_time() - cpu


def learn_once(config: Config, folder: Path) -> Tokenizer:
    """Leave a trained tokenizer in the scratch folder, because learning it is not what is measured."""
    (folder / "output").mkdir()
    prepare_corpus(config, folder / "scratch", folder / "output")
    return load_tokenizer(folder / "output")


def bare_loop(tokenizer: Tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        tokenizer.encode_batch(texts[start : start + BATCH_DOCUMENTS])


def end_to_end(config: Config, folder: Path) -> None:
    """prepare_corpus with its tokenizer but without the shards of an earlier round; includes held-out files."""
    for shard in (folder / "scratch").glob("prepare-*/*.npz"):
        shard.unlink()
    shutil.rmtree(folder / "output")
    (folder / "output").mkdir()
    prepare_corpus(config, folder / "scratch", folder / "output")


if __name__ == "__main__":
    main()
