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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from modularforge.config import WHOLE_CORPUS, CleanStepConfig, Config
from modularforge.data import duplicates
from modularforge.data.clean_shards import ENDING, FOLDER, SAMPLES, Tally, Task, clean_shard, read_tally
from modularforge.data.clean_steps import checked, cores, index_folder, try_steps, write_index
from modularforge.data.corpus import read_documents
from modularforge.data.inputs import file_states, list_matches
from modularforge.data.pieces import SURVIVAL, Listing, Unit, list_pieces, plan_units, require_documents
from modularforge.data.shards import grouped
from modularforge.errors import DataError
from modularforge.log import logger

REPORT_NAME = "cleaning.json"
SHARDS_A_FILE = 64


def clean_corpus(
    config: Config, scratch: Path, output: Path, states: Mapping[str, list[Any]] | None = None
) -> dict[str, Any]:
    """Write the cleaned documents and `cleaning.json` into `output`; return what the last says.

    `states` are those of the files, if known. `scratch` must be the same folder when a killed run is repeated. Raises
    ConfigError for an option that a step has not, DataError where nothing is left of a split of a source.
    """
    listing = Listing(file_states(list_matches(config)) if states is None else dict(states))
    prepare_steps(config, scratch)
    units = plan_units(list_pieces(config, listing, None))
    with closing(Workers(cores())) as workers:
        cleaner = Cleaner(config, scratch, scratch, workers.in_order)
        shards = cleaner.read(units)
        require_documents(config, [{"found": cleaner.found}])
        for place in whole_corpus_places(config):
            shards = cleaner.without_copies(shards, place)
    report = make_report(config, cleaner.passes, cleaner.copies, cleaner.short)
    write_files(shards, output / FOLDER)
    write_report(report, output)
    return report


def prepare_steps(config: Config, folder: Path) -> None:
    """Find mistakes in the options before the work, and write what documents are compared with into `folder`."""
    for place, item in enumerate(config.data.clean):
        if item.step == "near":
            duplicates.minhash_config(item.options)
        elif item.step == "exact":
            checked(item.step, item.options, lambda: None)
        elif item.step == "decontaminate":
            options = checked(item.step, item.options, write_index, ("language",), ("folder", "options"))
            write_index(index_folder(folder, place), **options)
    try_steps(config.data.clean, folder)


def whole_corpus_places(config: Config) -> list[int]:
    """The places of the steps that end a pass, because they need the whole corpus."""
    return [place for place, item in enumerate(config.data.clean) if item.step in WHOLE_CORPUS]


@dataclass
class Cleaner:
    """The passes over the shards, which come in the order in which copies survive.

    `sets` is the folder of `prepare_steps`; `scratch` keeps what is done, should it be killed.
    """

    config: Config
    scratch: Path
    sets: Path
    in_order: duplicates.InOrder
    short: Counter[str] = field(default_factory=Counter)
    found: dict[str, Counter[str]] = field(default_factory=dict)
    copies: list[dict[str, Any]] = field(default_factory=list)
    passes: list[list[Tally]] = field(default_factory=list)

    def read(self, units: Iterable[Unit]) -> list[Path]:
        """The first pass: what the sources hold, through the steps before the first that needs the whole corpus."""
        return self.passed(self._first_tasks(units), 0)

    def without_copies(self, shards: list[Path], place: int) -> list[Path]:
        """Find the copies that the step at this place removes, and pass over the shards without them."""
        item, tallies = self.config.data.clean[place], self.passes[-1]
        counts = [tally.kept["documents"] for tally in tallies]
        logger.info("looking for %s duplicates among %d documents", item.step, sum(counts))
        found = duplicates.find_copies(item, shards, counts, self.scratch / f"copies-{place:02d}", self.in_order)
        held_out = sum(count for tally, count in zip(tallies, counts, strict=True) if tally.split != "train")
        self.copies.append(report_of_copies(place, item, found, held_out))
        return self.pass_without(shards, tallies, found.removed, place)

    def pass_without(
        self, shards: Sequence[Path], tallies: Sequence[Tally], removed: duplicates.Indices, place: int
    ) -> list[Path]:
        """The pass behind the step at this place, which removes these documents, by their place in these shards."""
        return self.passed(self._next_tasks(shards, tallies, removed, place + 1), place + 1)

    def _first_tasks(self, units: Iterable[Unit]) -> Iterator[Task]:
        data = self.config.data
        for unit in units:
            files = [(piece.file, piece.span) for piece in unit.pieces if piece.file is not None]
            source, short = data.sources[unit.source], self.short if unit.split == "train" else None
            found = self.found.setdefault(f"{unit.split} {unit.source}", Counter())
            documents = read_documents(source, unit.split, data, short, None, files or None, found)
            for group in grouped(documents, self._folder(0), unit.name):
                texts = [(document.text, document.label) for document in group.documents]
                yield Task(group.path.with_suffix(ENDING), source.name, unit.split, texts)

    def _next_tasks(
        self, shards: Sequence[Path], tallies: Sequence[Tally], removed: duplicates.Indices, first: int
    ) -> Iterator[Task]:
        counts = np.array([tally.kept["documents"] for tally in tallies], np.int64)
        ends = np.cumsum(counts)
        for shard, tally, start, end in zip(shards, tallies, ends - counts, ends, strict=True):
            chosen = removed[np.searchsorted(removed, start) : np.searchsorted(removed, end)] - start
            target = self._folder(first) / shard.name
            yield Task(target, tally.source, tally.split, shard, frozenset(chosen.tolist()))

    def _folder(self, first: int) -> Path:
        folder = self.scratch / f"pass-{first:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def passed(self, tasks: Iterator[Task], first: int) -> list[Path]:
        """The shards that a pass makes, with the steps from `first` to the next that needs the whole corpus."""
        steps = self.config.data.clean
        last = next((place for place in whole_corpus_places(self.config) if place >= first), len(steps))
        shards: list[Path] = []
        with progress("clean", None, "shards") as bar:
            for shard in self.in_order(partial(clean_shard, steps, self.sets, first, last), tasks):
                shards.append(shard)
                bar.advance(1)
        self.passes.append([read_tally(shard) for shard in shards])
        return shards


def make_report(
    config: Config, passes: Sequence[Sequence[Tally]], copies: Sequence[Any], short: Mapping[str, int]
) -> dict[str, Any]:
    """What `cleaning.json` says; raises DataError where nothing is left of a split of a source."""
    tallies = [tally for found in passes for tally in found]
    report = {
        "steps": redact_values([item.model_dump() for item in config.data.clean]),
        "read": _by_split(passes[0], "read"),
        "kept": _by_split(passes[-1], "kept"),
        "counts": list(_counts(config, tallies)),
        "samples": list(_samples(tallies)),
        "copies": list(copies),
        "short_documents": dict(sorted(short.items())),
    }
    _require_left(config, report)
    return report


def write_report(report: Mapping[str, Any], output: Path) -> None:
    """Write `cleaning.json`."""
    (output / REPORT_NAME).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _counts(config: Config, tallies: Sequence[Tally]) -> Iterator[dict[str, Any]]:
    """One record for each step and source."""
    for (place, item), source in itertools.product(enumerate(config.data.clean), config.data.sources):
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


def report_of_copies(place: int, item: CleanStepConfig, found: duplicates.Found, held_out: int) -> dict[str, Any]:
    """What the report says of a step that removes copies from documents of which the first `held_out` are held out.

    Of near ones, removed documents of training that had their like held out, and how many still have. The last is
    counted from the pairs as they were found, not from what was made of them, and is 0.
    """
    report: dict[str, Any] = {"place": place, "step": item.step, "removed": len(found.removed)}
    if item.step != "near":
        return report
    is_training_P2 = found.pairs >= held_out
    across = is_training_P2[:, 0] != is_training_P2[:, 1]
    left = int((across & ~np.isin(found.pairs, found.removed).any(axis=1)).sum())
    shared = int(((found.removed >= held_out) & (found.kept < held_out)).sum())
    if left:
        raise AssertionError(f"{left} near duplicates are left across splits")
    return {**report, "shared_with_held_out": shared, "still_shared": left}


def _require_left(config: Config, report: dict[str, Any]) -> None:
    for source, split in itertools.product(config.data.sources, SURVIVAL):
        if not report["kept"].get(source.name, {}).get(split, {}).get("documents"):
            own = [row for row in report["counts"] if row["source"] == source.name]
            most = max(own, key=lambda row: row["dropped"])
            raise DataError(
                f"source {source.name} must have {split} documents after cleaning, but has none (most were dropped by "
                f"{most['step']}: {most['dropped']} of {most['documents']}); ease that step, or add documents"
            )


def write_files(shards: Iterable[Path], folder: Path) -> list[Path]:
    """The shards of a unit one after another, many in one file; files of a split of a source are numbered."""
    folder.mkdir(parents=True)
    made: list[Path] = []
    for prefix, found in itertools.groupby(shards, lambda path: "-".join(path.name.split("-")[1:3])):
        number = 0
        for _, own in itertools.groupby(found, lambda path: path.name.split("-")[3]):
            for _, some in itertools.groupby(enumerate(own), lambda item: item[0] // SHARDS_A_FILE):
                made.append(folder / f"{prefix}-{number:05d}{ENDING}")
                with open(made[-1], "wb") as file:
                    for _, shard in some:
                        file.write(shard.read_bytes())
                number += 1
    return made


class Workers:
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
