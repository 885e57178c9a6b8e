"""Cleaning by tasks side by side: each takes its share of the units through a pass, and signs what that leaves.

A task leaves its shards, what was counted, and, before a step that needs the whole corpus, the signatures of its
documents as one file of each bucket. From all signatures another job finds which documents that step removes, and says
so to each task by their place among its own. The last pass leaves files of cleaned documents, which are only counted
and numbered anew when all are there. No byte depends on the number of tasks.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import Artifact
from checkpoints.parallel import in_order
from modularforge.config import Config
from modularforge.data import duplicates
from modularforge.data.clean_shards import ENDING, FOLDER, SAMPLES, Tally, load_tally
from modularforge.data.clean_steps import cores
from modularforge.data.cleaning import (
    Cleaner,
    Workers,
    make_report,
    report_of_copies,
    whole_corpus_places,
    write_files,
    write_report,
)
from modularforge.data.pieces import Unit, require_documents
from modularforge.log import logger

SHARE_NAME, COPIES_NAME = "share.json", "copies.json"
FILES_AT_ONCE = 8  # of a store that is far away
SHARDS, SIGNATURES = "shards", "signatures"


def first_share(config: Config, units: Sequence[Unit], index: int, sets: Path, scratch: Path, output: Path) -> int:
    """Read a task's units and take them through the first pass, into `output`; returns how many documents are left.

    `sets` is the folder of `prepare_steps`; `scratch` must be the same folder when a killed task is repeated.
    """
    with closing(Workers(cores())) as workers:
        cleaner = Cleaner(config, scratch, sets, workers.in_order)
        return _keep(cleaner, cleaner.read(units), index, 0, output)


def next_share(
    config: Config, before: Artifact, copies: Artifact, number: int, index: int, sets: Path, scratch: Path, output: Path
) -> int:
    """Take what a task left of the pass before through pass `number`, without the copies that were found."""
    share = before.read_json(SHARE_NAME)
    names = [f"{SHARDS}/{name}" for name, *_ in share["shards"]]
    folder = before.local_folder(names=names)
    tallies = [Tally(source, split, kept=Counter(documents=count)) for _, source, split, count in share["shards"]]
    removed = np.load(copies.local_file(_removed_name(index)))
    with closing(Workers(cores())) as workers:
        cleaner = Cleaner(config, scratch, sets, workers.in_order)
        place = whole_corpus_places(config)[number - 1]
        shards = cleaner.pass_without([folder / name for name in names], tallies, removed, place)
        return _keep(cleaner, shards, index, number, output)


def _keep(cleaner: Cleaner, shards: list[Path], index: int, number: int, output: Path) -> int:
    """Leave what a pass has made: cleaned documents after the last, else shards and their signatures."""
    tallies, places = cleaner.passes[-1], whole_corpus_places(cleaner.config)
    counts = [tally.kept["documents"] for tally in tallies]
    rows = zip(shards, tallies, counts, strict=True)
    share = {
        "shards": [[shard.name, tally.source, tally.split, count] for shard, tally, count in rows],
        "tallies": [vars(tally) for tally in _together(tallies)],
        "short": cleaner.short,
        "found": cleaner.found,
    }
    (output / SHARE_NAME).write_text(json.dumps(share, ensure_ascii=False) + "\n", encoding="utf-8")
    if number == len(places):
        write_files(shards, output / FOLDER)
        return sum(counts)
    _give(shards, output / SHARDS)
    work = cleaner.scratch / f"copies-{places[number]:02d}"
    if shards:
        rank = duplicates.Rank(index, shards, counts)
        duplicates.sign(cleaner.config.data.clean[places[number]], [rank], work, cleaner.in_order)
    for bucket in (work / SIGNATURES).glob("*"):
        _give(bucket.iterdir(), output / SIGNATURES / bucket.name)
    return sum(counts)


def _give(files: Iterable[Path], target: Path) -> None:
    """Another name of each file, or its bytes where there can be none."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)


def _together(tallies: Iterable[Tally]) -> list[Tally]:
    """One tally for each split of a source, with the first samples of each step."""
    found: dict[tuple[str, str], Tally] = {}
    for tally in tallies:
        total = found.setdefault((tally.source, tally.split), Tally(tally.source, tally.split))
        total.read.update(tally.read)
        total.kept.update(tally.kept)
        for name in ("steps", "reasons"):
            for place, counts in getattr(tally, name).items():
                getattr(total, name).setdefault(place, Counter()).update(counts)
        for sample in tally.samples:
            if sum(one["place"] == sample["place"] for one in total.samples) < SAMPLES:
                total.samples.append(sample)
    return list(found.values())


def find_copies_of_all(config: Config, parts: Sequence[Artifact], number: int, scratch: Path, output: Path) -> int:
    """Find what the step before pass `number` removes from what all tasks have left; returns how many documents.

    Memory grows with the documents that have copies, and with nothing else.
    """
    place = whole_corpus_places(config)[number - 1]
    item, shares = config.data.clean[place], [part.read_json(SHARE_NAME) for part in parts]
    rows = [share["shards"] for share in shares]
    if number == 1:
        require_documents(config, shares)
    starts = np.concatenate([[0], np.cumsum([sum(row[3] for row in own) for own in rows])])
    held_out = sum(count for own in rows for _, _, split, count in own if split != "train")
    shutil.rmtree(scratch / SIGNATURES, ignore_errors=True)
    files = [(part, name) for part in parts for name in part.manifest.files if name.startswith(f"{SIGNATURES}/")]
    here = in_order(lambda file: file[0].local_file(file[1]), files, FILES_AT_ONCE)
    for (_, name), path in zip(files, here, strict=True):
        _give([path], (scratch / name).parent)
    logger.info("looking for %s duplicates among %d documents", item.step, starts[-1])
    with closing(Workers(cores())) as workers:
        found = duplicates.found(item, starts[:-1], scratch, workers.in_order)
    removed = np.sort(found.removed)
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        own = removed[np.searchsorted(removed, start) : np.searchsorted(removed, end)] - start
        np.save(output / _removed_name(index), own)
    report = report_of_copies(place, item, found, held_out)
    (output / COPIES_NAME).write_text(json.dumps(report) + "\n", encoding="utf-8")
    return len(removed)


def _removed_name(index: int) -> str:
    return f"removed-{index:05d}.npy"


def join_cleaned(
    config: Config,
    passes: Sequence[Sequence[Artifact]],
    copies: Sequence[Artifact],
    output: Path,
    take: Callable[[Artifact, str, str], Any],
) -> dict[str, Any]:
    """Put together `cleaning.json` and files of documents from what tasks have left; returns what the first says.

    `take` gives a file of a task's artifact to what is being made, under this name. Raises DataError.
    """
    shares = [[part.read_json(SHARE_NAME) for part in parts] for parts in passes]
    require_documents(config, shares[0])
    short: Counter[str] = Counter()
    for share in shares[0]:
        short.update(share["short"])
    tallies = [[load_tally(values) for share in own for values in share["tallies"]] for own in shares]
    report = make_report(config, tallies, [one.read_json(COPIES_NAME) for one in copies], short)
    for part, name, target in _numbered(passes[-1]):
        take(part, name, target)
    write_report(report, output)
    return report


def _numbered(parts: Iterable[Artifact]) -> Iterator[tuple[Artifact, str, str]]:
    """Files of documents of all tasks, and their names among all of a split of a source."""
    counts: Counter[str] = Counter()
    for part in parts:
        for name in sorted(name for name in part.manifest.files if name.startswith(f"{FOLDER}/")):
            prefix = name.rpartition("-")[0]
            yield part, name, f"{prefix}-{counts[prefix]:05d}{ENDING}"
            counts[prefix] += 1
