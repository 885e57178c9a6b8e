"""Clean a corpus: read its documents, take the steps of `data.clean`, keep what is left in files of JSON lines.

Work goes shard by shard, some 8 MiB of text, on all cores; a finished shard lies in the scratch folder, so that a
killed run repeats only those it was at. A step that needs the whole corpus (`exact`, `near`) ends a pass over the
shards. The output is `documents/SPLIT-SOURCE-NUMBER.jsonl.zst` and `cleaning.json`, which counts what each step dropped
and changed, of which source and why, with a few of the texts.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.redact import redact_values
from checkpoints.screen import progress
from modularforge.config import Config
from modularforge.data import duplicates
from modularforge.data.clean_shards import ENDING, SAMPLES, Tally, Task, clean_shard, read_shard, read_tally, records
from modularforge.data.clean_steps import WHOLE_CORPUS, checked, cores, index_folder, make_steps, write_index
from modularforge.data.corpus import Document, Split, read_documents
from modularforge.data.shards import grouped
from modularforge.errors import DataError
from modularforge.log import logger

SURVIVAL: tuple[Split, ...] = ("test", "validation", "train")
"""The split whose copy stays, where several have one."""
REPORT_NAME = "cleaning.json"
FOLDER = "documents"
SHARDS_A_FILE = 64


def clean_corpus(config: Config, scratch: Path, output: Path) -> dict[str, Any]:
    """Write the cleaned documents and `cleaning.json` into `output`; return what the last says.

    `scratch` must be the same folder when a killed run is repeated. Raises ConfigError for an option that a step has
    not, DataError where nothing is left of a split of a source.
    """
    with closing(_Workers(cores())) as workers:
        cleaner = _Cleaner(config, scratch, workers.in_order)
        cleaner.prepare()
        shards = cleaner.read()
        for place, item in enumerate(config.data.clean):
            if item.step in WHOLE_CORPUS:
                shards = cleaner.without_copies(shards, place)
    report = cleaner.report()
    _require_left(config, report)
    _write_files(shards, output / FOLDER)
    (output / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def read_cleaned(folder: Path, source: int, split: Split) -> Iterator[Document]:
    """The documents of a split of the source with this number in the settings."""
    return read_cleaned_files(sorted((folder / FOLDER).glob(f"{split}-{source:04d}-*{ENDING}")))


def read_cleaned_files(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of files of cleaned ones."""
    return (Document(record["text"], record["label"]) for path in paths for record in records(path))


def cleaned_names(names: Iterable[str], source: int, split: Split) -> list[str]:
    """Those of the files of cleaned documents that are of a split of the source with this number, in order."""
    return sorted(name for name in names if name.startswith(f"{FOLDER}/{split}-{source:04d}-"))


@dataclass
class _Cleaner:
    """The passes over the shards, which come in the order in which copies survive."""

    config: Config
    scratch: Path
    in_order: duplicates.InOrder
    short: Counter[str] = field(default_factory=Counter)
    copies: list[dict[str, Any]] = field(default_factory=list)
    passes: list[list[Tally]] = field(default_factory=list)

    def prepare(self) -> None:
        """Find mistakes in the options before the work, and write what documents are compared with."""
        for place, item in enumerate(self.config.data.clean):
            if item.step == "near":
                duplicates.minhash_config(item.options)
            elif item.step == "exact":
                checked(item.step, item.options, lambda: None)
            elif item.step == "decontaminate":
                options = checked(item.step, item.options, write_index, ("language",), ("folder", "options"))
                write_index(index_folder(self.scratch, place), **options)
        make_steps(self.config.data.clean, self.scratch, None)

    def read(self) -> list[Path]:
        """The first pass: what the sources hold, through the steps before the first that needs the whole corpus."""
        return self._passed(self._first_tasks(), 0)

    def without_copies(self, shards: list[Path], place: int) -> list[Path]:
        """Find the copies that the step at this place removes, and pass over the shards without them."""
        item, counts = self.config.data.clean[place], [tally.kept["documents"] for tally in self.passes[-1]]
        logger.info("looking for %s duplicates among %d documents", item.step, sum(counts))
        find = duplicates.exact if item.step == "exact" else partial(duplicates.near, options=item.options)
        found = find(shards, counts, self.scratch / f"copies-{place:02d}", read_shard, self.in_order)
        is_training = np.repeat([tally.split == "train" for tally in self.passes[-1]], counts)
        across = _across_splits(found, is_training) if item.step == "near" else {}
        self.copies.append({"place": place, "step": item.step, "removed": len(found.removed), **across})
        return self._passed(self._next_tasks(shards, counts, found.removed, place + 1), place + 1)

    def _first_tasks(self) -> Iterator[Task]:
        for order, split in enumerate(SURVIVAL):
            for number, source in enumerate(self.config.data.sources):
                documents = read_documents(source, split, self.config.data, self.short if split == "train" else None)
                for group in grouped(documents, self._folder(0), f"{order}-{split}-{number:04d}"):
                    texts = [(document.text, document.label) for document in group.documents]
                    yield Task(group.path.with_suffix(ENDING), source.name, split, texts)

    def _next_tasks(self, shards: list[Path], counts: list[int], removed: Any, first: int) -> Iterator[Task]:
        ends = np.cumsum(counts)
        for shard, tally, start, end in zip(shards, self.passes[-1], ends - counts, ends, strict=True):
            chosen = removed[np.searchsorted(removed, start) : np.searchsorted(removed, end)] - start
            target = self._folder(first) / shard.name
            yield Task(target, tally.source, tally.split, shard, frozenset(chosen.tolist()))

    def _folder(self, first: int) -> Path:
        folder = self.scratch / f"pass-{first:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _passed(self, tasks: Iterator[Task], first: int) -> list[Path]:
        """The shards that a pass makes, with the steps from `first` to the next that needs the whole corpus."""
        steps = self.config.data.clean
        last = next((k for k in range(first, len(steps)) if steps[k].step in WHOLE_CORPUS), len(steps))
        shards: list[Path] = []
        with progress("clean", None, "shards") as bar:
            for shard in self.in_order(partial(clean_shard, steps, self.scratch, first, last), tasks):
                shards.append(shard)
                bar.advance(1)
        self.passes.append([read_tally(shard) for shard in shards])
        return shards

    def report(self) -> dict[str, Any]:
        """What `cleaning.json` says."""
        tallies = [tally for found in self.passes for tally in found]
        return {
            "steps": redact_values([item.model_dump() for item in self.config.data.clean]),
            "read": _by_split(self.passes[0], "read"),
            "kept": _by_split(self.passes[-1], "kept"),
            "counts": list(self._counts(tallies)),
            "samples": list(_samples(tallies)),
            "copies": self.copies,
            "short_documents": dict(sorted(self.short.items())),
        }

    def _counts(self, tallies: Sequence[Tally]) -> Iterator[dict[str, Any]]:
        """One record for each step and source."""
        for (place, item), source in itertools.product(enumerate(self.config.data.clean), self.config.data.sources):
            own = [tally for tally in tallies if tally.source == source.name]
            counts, reasons = Counter[str](documents=0, dropped=0, dropped_bytes=0, changed=0), Counter[str]()
            for tally in own:
                counts.update(tally.steps.get(str(place), {}))
                reasons.update(tally.reasons.get(str(place), {}))
            record = {"place": place, "step": item.step, "source": source.name}
            yield {**record, **counts, "reasons": dict(reasons.most_common())}


def _samples(tallies: Iterable[Tally]) -> Iterator[dict[str, Any]]:
    seen: Counter[tuple[int, str]] = Counter()
    for sample in (sample for tally in tallies for sample in tally.samples):
        key = sample["place"], sample["source"]
        seen[key] += 1
        if seen[key] <= SAMPLES:
            yield sample


def _by_split(tallies: Iterable[Tally], name: str) -> dict[str, dict[str, dict[str, int]]]:
    """Documents and bytes by source and split."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for tally in tallies:
        found.setdefault(tally.source, {}).setdefault(tally.split, Counter()).update(getattr(tally, name))
    return {source: {split: dict(amount) for split, amount in splits.items()} for source, splits in found.items()}


def _across_splits(found: duplicates.Found, is_training: Any) -> dict[str, int]:
    """Removed documents of training that had their like held out, and how many still have.

    The last is counted from the pairs as they were found, not from what was made of them, and is 0.
    """
    is_kept = np.ones(len(is_training), bool)
    is_kept[found.removed] = False
    across = is_training[found.pairs[:, 0]] != is_training[found.pairs[:, 1]]
    left = int((across & is_kept[found.pairs].all(axis=1)).sum())
    shared = int((is_training[found.removed] & ~is_training[found.kept]).sum())
    if left:
        raise AssertionError(f"{left} near duplicates are left across splits")
    return {"shared_with_held_out": shared, "still_shared": left}


def _require_left(config: Config, report: dict[str, Any]) -> None:
    for source, split in itertools.product(config.data.sources, SURVIVAL):
        if not report["kept"].get(source.name, {}).get(split, {}).get("documents"):
            own = [row for row in report["counts"] if row["source"] == source.name]
            most = max(own, key=lambda row: row["dropped"])
            raise DataError(
                f"source {source.name} must have {split} documents after cleaning, but has none (most were dropped by "
                f"{most['step']}: {most['dropped']} of {most['documents']}); ease that step, or add documents"
            )


def _write_files(shards: Iterable[Path], folder: Path) -> None:
    """The shards of a split of a source one after another, many in one file."""
    folder.mkdir(parents=True)
    for prefix, found in itertools.groupby(shards, lambda path: "-".join(path.name.split("-")[1:3])):
        numbered = enumerate(found)
        for number, some in itertools.groupby(numbered, lambda item: item[0] // SHARDS_A_FILE):
            with open(folder / f"{prefix}-{number:05d}{ENDING}", "wb") as file:
                for _, shard in some:
                    file.write(shard.read_bytes())


class _Workers:
    """As many processes as there are cores, started for the second item of the first list that has two."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def in_order(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the items, few of which are held at a time."""
        iterator = iter(items)
        head = list(itertools.islice(iterator, 2))
        if self.count == 1 or len(head) < 2:
            yield from map(function, itertools.chain(head, iterator))
            return
        self.pool = self.pool or ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"))
        running: deque[Future[Any]] = deque()
        try:
            for item in itertools.chain(head, iterator):
                running.append(self.pool.submit(function, item))
                if len(running) > 2 * self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "cleaning must have the memory for a shard on each core, but one of its processes was ended; see "
                "whether the machine ran out of memory, and begin again: finished shards are kept"
            ) from error

    def close(self) -> None:
        """End the processes; what they have not begun is not done."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
