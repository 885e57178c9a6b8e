"""Preparing data: speed beside `tokenizers` alone, and peak memory, by one process and by tasks, for several sizes.

    python -m benchmarks.preparation [--megabytes 100 1000] [--tasks 4]

The text is the package's sample again and again, each document with a number before it, in files of JSON lines of some
8 MB. Tasks run one after another here, each on all cores, so that their memory is that of each alone. `tokenizers` has
its texts in memory, 20 MB of them, and writes nothing. Speeds are of a second of processor, whatever else the machine
does, beside the seconds of a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from modularforge.config import SourceConfig
from modularforge.data.files import find_files
from modularforge.data.formats import read_file
from modularforge.data.tokenizer import encode_texts, load_tokenizer

DOMAINS = ("law", "english_novels", "french_novels", "standards", "c_code")
FILE_BYTES, BARE_BYTES, BATCH_DOCUMENTS = 8_000_000, 20_000_000, 256


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000], help="sizes of the text")
    parser.add_argument("--tasks", type=int, default=4, help="how many share the work in a second run; 0 leaves it out")
    arguments = parser.parse_args()
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder), megabytes * 1_000_000)
            measure(Path(folder), megabytes, arguments.tasks)


def write_corpus(folder: Path, size: int) -> None:
    """Files of some 8 MB until they hold so many bytes of text, and a small one for validation and test."""
    texts = [
        text
        for name in DOMAINS
        for url in find_files(f"sample:{name}/train.jsonl.gz")
        for text, _ in read_file(url, SourceConfig(name=name, train=url))
    ]
    numbered = _numbered(texts)
    for number in range(-(-size // FILE_BYTES)):
        _write(folder / f"train-{number:05d}.jsonl", numbered, min(FILE_BYTES, size - number * FILE_BYTES))
    _write(folder / "held-out.jsonl", numbered, 100_000)


def _numbered(texts: list[str]) -> Iterator[str]:
    count = 0
    while True:
        for text in texts:
            yield f"{count} {text}"
            count += 1


def _write(path: Path, texts: Iterator[str], size: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        while size > 0:
            text = next(texts)
            size -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def measure(folder: Path, megabytes: int, tasks: int) -> None:
    """Prepare the corpus alone and, where there are some, by tasks, and tokenise some of it without anything else."""
    settings = folder / "settings.yaml"
    alone = command(folder, settings, None, "prepare-data")
    bare = bare_speed(folder)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; tokenizers alone {bare:.2f} MB/s of processor")
    print(row(megabytes, "one process", *alone), flush=True)
    if not tasks:
        return
    first = command(folder, settings, tasks, "vocabulary")
    shares = [command(folder, settings, tasks, "tokenise", "--index", str(index)) for index in range(tasks)]
    last = command(folder, settings, tasks, "prepare-data")
    print(row(megabytes, "vocabulary", *first))
    clock, processor = (sum(one[place] for one in shares) for place in (0, 1))
    print(row(megabytes, f"{tasks} shares", clock, processor, max(one[2] for one in shares)))
    print(row(megabytes, "put together", *last), flush=True)


def row(megabytes: int, what: str, clock: float, processor: float, peak: float) -> str:
    """A line of the table."""
    speed = f"{megabytes / processor:7.2f} MB/s of processor"
    return f"{megabytes:6} MB  {what:12}  {clock:7.1f} s by the clock  {speed}  peak {peak:6.0f} MiB"


def command(folder: Path, settings: Path, tasks: int | None, *words: str) -> tuple[float, float, float]:
    """Run a command of modularforge on the corpus; seconds by the clock and of processor, peak memory in MiB."""
    source = {"name": "text", "train": str(folder / "train-*.jsonl")}
    source |= dict.fromkeys(("validation", "test"), str(folder / "held-out.jsonl"))
    values = {
        "output_dir": str(folder / f"run-{tasks}"),
        "data": {"sources": [source], "vocab_size": 16384},
        "partition": {"method": "random"},
        "cluster": {"prepare_tasks": tasks},
    }
    settings.write_text(yaml.safe_dump(values))
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "modularforge", *words, "--config", str(settings)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} must end with code 0, but ended with status {status}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def bare_speed(folder: Path) -> float:
    """MB/s of `tokenizers` alone, with the tokenizer that was learned."""
    tokenizer, texts, held = load_tokenizer(folder / "run-None/data"), list[str](), 0
    for path in sorted(folder.glob("train-*.jsonl")):
        if held < BARE_BYTES:
            texts += [text for text, _ in read_file(str(path), SourceConfig(name="text", train=str(path)))]
            held += path.stat().st_size
    start = time.process_time()
    for place in range(0, len(texts), BATCH_DOCUMENTS):
        encode_texts(tokenizer, texts[place : place + BATCH_DOCUMENTS])
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.process_time() - start)


if __name__ == "__main__":
    main()
