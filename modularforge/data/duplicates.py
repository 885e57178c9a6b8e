"""Documents that stand in a corpus more than once, exactly or nearly, found by datatrove's steps.

Shards come in the order in which copies survive, and the first document of those that are alike stays: test before
validation before training, so that what is measured is not trained on; then sources as the settings name them, then
files and lines. Near duplicates are those that share a band of MinHash signatures of word n-grams (arXiv 2107.06499),
or are linked by others that do.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.paths import write_atomically
from modularforge.data.clean_steps import checked, datatrove, hashing, words_of

Indices = npt.NDArray[np.int64]
Read = Callable[[Path], Iterable[Any]]
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
MOST_RANKS = 256  # signature files that are open at a time; all of one rank are held in memory
HIGHEST_PRIORITY = 65535
LINES_AT_ONCE = 1024


@dataclass(frozen=True)
class Found:
    """Documents that a step removes, by their place in the corpus; of near duplicates the copy of each that stays."""

    removed: Indices
    kept: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    pairs: Indices = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """Every two near duplicates that were found alike [P, 2]."""


def exact(shards: Sequence[Path], counts: Sequence[int], work: Path, read: Read, in_order: InOrder) -> Found:
    """All copies of a text but the first; `counts` are the documents of each shard."""
    ranks = _ranks(shards, counts)
    _signed(ranks, work, partial(_sign_exact, work, read), in_order)
    module = datatrove("pipeline.dedup.exact_dedup")
    _emptied(work / "found")
    with _quiet():
        module.ExactFindDedups(
            str(work / "signatures"), str(work / "found"), _exact_config(module, 0), lines_to_buffer=LINES_AT_ONCE
        ).run(None, 0, 1)
    places = [
        np.sort(np.fromfile(path, "<u4").astype(np.int64)) + ranks[int(path.name.partition(".")[0])][1]
        for path in sorted((work / "found").rglob("*dup"))
    ]
    return Found(np.concatenate(places) if places else np.empty(0, np.int64))


def near(
    shards: Sequence[Path],
    counts: Sequence[int],
    work: Path,
    read: Read,
    in_order: InOrder,
    options: Mapping[str, Any],
) -> Found:
    """All of a group of near duplicates but the first; options are those of datatrove's `MinhashConfig`."""
    module = datatrove("pipeline.dedup.minhash")
    config = minhash_config(options)
    ranks = _ranks(shards, counts)
    _signed(ranks, work, partial(_sign_near, work, read, options), in_order)
    _emptied(work / "pairs")
    _emptied(work / "groups")
    list(in_order(partial(_find_pairs, work, options), range(config.num_buckets)))
    with _quiet():
        module.MinhashDedupCluster(str(work / "pairs"), str(work / "groups"), config, save_cluster_id=True).run(
            None, 0, 1
        )
    starts = np.array([start for _, start in ranks])
    grouped = [
        np.fromfile(path, "<u4").reshape(-1, 2) + np.array([starts[int(path.name.partition(".")[0])], 0])
        for path in sorted((work / "groups").glob("*.clusters"))
    ]
    places, groups = np.concatenate(grouped).T if grouped else np.empty((2, 0), np.int64)
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    kept = places[first][group_of]
    lines = [
        np.fromfile(path, "<u4").reshape(-1, 4).astype(np.int64) for path in sorted((work / "pairs").glob("*.dups"))
    ]
    files_P4 = np.concatenate(lines) if lines else np.empty((0, 4), np.int64)
    pairs = np.stack([starts[files_P4[:, at]] + files_P4[:, at + 1] for at in (0, 2)], axis=1)
    is_removed = places != kept
    return Found(places[is_removed], kept[is_removed], pairs)


def minhash_config(options: Mapping[str, Any]) -> Any:
    """datatrove's settings of MinHash; raises ConfigError for an option that it has not."""
    maker = datatrove("pipeline.dedup.minhash").MinhashConfig
    known = checked("near", options, maker, ("language",))
    return maker(**{name: value for name, value in known.items() if name != "language"}, hash_config=hashing())


def _ranks(shards: Sequence[Path], counts: Sequence[int]) -> list[tuple[list[Path], int]]:
    """Neighbouring shards that are signed together, and the place of the first document of each."""
    share = -(-len(shards) // MOST_RANKS) or 1
    starts = np.concatenate([[0], np.cumsum(counts)])
    return [(list(shards[at : at + share]), int(starts[at])) for at in range(0, len(shards), share)]


def _signed(
    ranks: Sequence[tuple[list[Path], int]],
    work: Path,
    sign: Callable[[tuple[int, list[Path]]], None],
    in_order: InOrder,
) -> None:
    """Sign what a killed run has not signed."""
    (work / "done").mkdir(parents=True, exist_ok=True)
    due = [(rank, shards) for rank, (shards, _) in enumerate(ranks) if not (work / "done" / str(rank)).exists()]
    list(in_order(sign, due))


def _sign_exact(work: Path, read: Read, task: tuple[int, list[Path]]) -> None:
    rank, shards = task
    module = datatrove("pipeline.dedup.exact_dedup")
    signer = module.ExactDedupSignature(str(work / "signatures"), _exact_config(module, rank))
    with _quiet():
        signer.run((document for shard in shards for document in read(shard)), rank)
    write_atomically(work / "done" / str(rank), [b""], replace=True)


def _exact_config(module: Any, rank: int) -> Any:
    def text(document: Any) -> str:
        found: str = document.text
        return found

    text.__annotations__["return"] = str  # datatrove reads it, and `from __future__` makes text of it
    return module.ExactDedupConfig(text, lambda _: HIGHEST_PRIORITY - rank, hashing())


def _sign_near(work: Path, read: Read, options: Mapping[str, Any], task: tuple[int, list[Path]]) -> None:
    rank, shards = task
    signer = datatrove("pipeline.dedup.minhash").MinhashDedupSignature(
        str(work / "signatures"), minhash_config(options), language=words_of(options)
    )
    with _quiet():
        signer.run((document for shard in shards for document in read(shard)), rank)
    write_atomically(work / "done" / str(rank), [b""], replace=True)


def _find_pairs(work: Path, options: Mapping[str, Any], bucket: int) -> None:
    config = minhash_config(options)
    finder = datatrove("pipeline.dedup.minhash").MinhashDedupBuckets(
        str(work / "signatures"), str(work / "pairs"), config=config, lines_to_buffer=LINES_AT_ONCE
    )
    with _quiet():
        finder.run(None, bucket, config.num_buckets)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that datatrove draws."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _emptied(folder: Path) -> None:
    """What a killed run left there would be read as this one's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
