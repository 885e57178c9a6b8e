"""Documents that stand in a corpus more than once, exactly or nearly, found by datatrove's steps.

Shards come in the order in which copies survive, and the first document of those that are alike stays: test before
validation before training, so that what is measured is not trained on; then sources as the settings name them, then
files and lines. Near duplicates are those that share a band of MinHash signatures of word n-grams (arXiv 2107.06499),
or are linked by others that do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoints.paths import write_atomically
from modularforge.config import CleanStepConfig
from modularforge.data.clean_shards import read_shard
from modularforge.data.clean_steps import checked, datatrove, hashing, words_of

Indices = npt.NDArray[np.int64]
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
MOST_RANKS = 256  # signature files that are open at a time; of one, those of a bucket are held in memory
HIGHEST_PRIORITY = 65535
LINES_AT_ONCE = 1024
SHINGLES_AT_ONCE = 1 << 14  # 15 MB of hashes with datatrove's 14 buckets of 8


@dataclass(frozen=True)
class Found:
    """Documents that a step removes, by their place in the corpus; of near duplicates the copy of each that stays."""

    removed: Indices
    kept: Indices = field(default_factory=lambda: np.empty(0, np.int64))
    pairs: Indices = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """Every two near duplicates that were found alike [P, 2]."""


@dataclass(frozen=True)
class Rank:
    """Neighbouring shards whose signatures are one file of each bucket, and the documents of each."""

    number: int
    shards: Sequence[Path]
    counts: Sequence[int]


def find_copies(
    item: CleanStepConfig, shards: Sequence[Path], counts: Sequence[int], work: Path, in_order: InOrder
) -> Found:
    """The documents that a step which looks at the whole corpus removes; `counts` are the documents of each shard."""
    size = -(-len(shards) // MOST_RANKS) or 1
    cuts = range(0, len(shards), size)
    ranks = [Rank(number, shards[at:][:size], counts[at:][:size]) for number, at in enumerate(cuts)]
    sign(item, ranks, work, in_order)
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1][::size]
    return found(item, starts, work, in_order)


def sign(item: CleanStepConfig, ranks: Sequence[Rank], work: Path, in_order: InOrder) -> None:
    """Write the signatures of all documents, `signatures/BUCKET/RANK…`; what was done before a kill is not repeated."""
    due = [rank for rank in ranks if not (work / "done" / str(rank.number)).exists()]
    shards = [(shard, _folder(work, rank, place)) for rank in due for place, shard in enumerate(rank.shards)]
    list(in_order(partial(_sign, item), shards))
    list(in_order(partial(_merge, item, work), due))


def _folder(work: Path, rank: Rank, place: int) -> Path:
    """Of the signatures of one shard alone."""
    return work / "shards" / str(rank.number) / f"{place:06d}"


def found(item: CleanStepConfig, starts: Indices, work: Path, in_order: InOrder) -> Found:
    """The copies among what was signed in `work`; `starts` is the place of the first document of each rank."""
    if item.step == "exact":
        return _found_exact(starts, work)
    return _found_near(starts, work, in_order, item.options)


def _found_exact(starts: Indices, work: Path) -> Found:
    module = datatrove("pipeline.dedup.exact_dedup")
    _emptied(work / "found")
    with _quiet():
        module.ExactFindDedups(
            str(work / "signatures"), str(work / "found"), _exact_config(module), lines_to_buffer=LINES_AT_ONCE
        ).run(None, 0, 1)
    places = [
        np.sort(np.fromfile(path, "<u4").astype(np.int64)) + starts[int(path.name.partition(".")[0])]
        for path in sorted((work / "found").rglob("*dup"))
    ]
    return Found(np.concatenate(places) if places else np.empty(0, np.int64))


def _found_near(starts: Indices, work: Path, in_order: InOrder, options: Mapping[str, Any]) -> Found:
    module = datatrove("pipeline.dedup.minhash")
    config = minhash_config(options)
    _emptied(work / "pairs")
    _emptied(work / "groups")
    list(in_order(partial(_find_pairs, work, options), range(config.num_buckets)))
    with _quiet():
        module.MinhashDedupCluster(str(work / "pairs"), str(work / "groups"), config, save_cluster_id=True).run(
            None, 0, 1
        )
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


def _sign(item: CleanStepConfig, task: tuple[Path, Path]) -> None:
    """Write the signatures of one shard into a folder, unless that is done; the first rank's, sorted."""
    shard, folder = task
    if (folder / "done").exists():
        return
    _emptied(folder)
    with _quiet():
        signer(item, str(folder)).run(read_shard(shard), 0)
    (folder / "done").touch()


def signer(item: CleanStepConfig, folder: str) -> Any:
    """datatrove's step that writes the signatures of documents into a folder."""
    if item.step == "exact":
        module = datatrove("pipeline.dedup.exact_dedup")
        return module.ExactDedupSignature(folder, _exact_config(module))
    config = minhash_config(item.options)
    config.norm_config.norm_unicode_diacritics = False  # which `_Unmarked` does
    signer = datatrove("pipeline.dedup.minhash").MinhashDedupSignature(folder, config, words_of(item.options))
    signer.word_tokenizer = _Unmarked(signer.word_tokenizer)
    signer.get_signature = partial(_signature, signer.get_signature)
    signer.get_shingles = partial(_shingles, signer.word_tokenizer, config)
    return signer


def _shingles(tokenizer: Any, config: Any, text: str) -> Any:
    """datatrove's hashes of n-grams, [N, 1]: the first 64 bits of SHA-1, which it unpacks one by one in Python."""
    words = tokenizer.word_tokenize(datatrove("utils.text").simplify_text(text, config.norm_config))
    encoded = "\n".join(words).encode().split(b"\n")
    if len(encoded) != len(words):  # a language's words may have line ends in them, and no words are no empty word
        encoded = [word.encode() for word in words]
    grams = map(b" ".join, zip(*(encoded[at:] for at in range(config.n_grams)), strict=False))
    digests = b"".join([hashlib.sha1(gram, usedforsecurity=False).digest() for gram in grams])
    return np.frombuffer(digests, np.dtype([("first", "<u8"), ("rest", "V12")]))["first"].reshape(-1, 1)


def _signature(whole: Callable[[Any], list[list[int]]], shingles: Any) -> list[list[int]]:
    """datatrove's signature, of some n-grams at a time: of all those of a book it would take gigabytes."""
    some = [whole(shingles[at:][:SHINGLES_AT_ONCE]) for at in range(0, len(shingles), SHINGLES_AT_ONCE)]
    return [[min(hashes) for hashes in zip(*buckets, strict=True)] for buckets in zip(*some, strict=True)]


@dataclass(frozen=True)
class _Unmarked:
    """Words of a text without its diacritics: datatrove's last step before, which looks at each character in Python.

    Here it looks at each kind of character: signatures are the same, and take an eighth less time.
    """

    words: Any

    def word_tokenize(self, text: str) -> list[str]:
        if not text.isascii():
            text = unicodedata.normalize("NFD", text)
            marks = [ord(sign) for sign in set(text) if unicodedata.category(sign) == "Mn"]
            text = text.translate(dict.fromkeys(marks)).strip()
        found: list[str] = self.words.word_tokenize(text)
        return found


def _merge(item: CleanStepConfig, work: Path, rank: Rank) -> None:
    """The signatures of a rank's shards in one file of each bucket, sorted, with places of documents in the rank."""
    kind, done = _record(item), work / "done" / str(rank.number)
    folders = [_folder(work, rank, place) for place in range(len(rank.shards))]
    offsets = (np.cumsum(rank.counts) - rank.counts).tolist()
    for first in sorted(folders[0].glob("*/00000*")):
        target = work / "signatures" / first.parent.name / f"{rank.number:05d}{first.name.removeprefix('00000')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if item.step == "near" and len(folders) == 1:
            first.replace(target)
            continue
        shards = [np.fromfile(folder / first.relative_to(folders[0]), kind) for folder in folders]
        for records, offset in zip(shards, offsets, strict=True):
            records["doc"] += np.uint32(offset)
            if item.step == "exact":
                records["priority"] = HIGHEST_PRIORITY - rank.number
        records = np.concatenate(shards)
        records.sort(order=kind.names)
        target.write_bytes(records.tobytes())
    done.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(done, [b""], replace=True)
    shutil.rmtree(folders[0].parent, ignore_errors=True)


def _record(item: CleanStepConfig) -> np.dtype[Any]:
    """One signature in datatrove's files."""
    if item.step == "exact":
        kind: np.dtype[Any] = datatrove("pipeline.dedup.exact_dedup").get_sig_dtype(hashing())
        return kind
    config = minhash_config(item.options)
    hashes = [(f"hash{k}", f"<{config.hash_config.struct_format}") for k in range(config.hashes_per_bucket)]
    return np.dtype([*hashes, ("doc", "<u4")])


def _exact_config(module: Any) -> Any:
    def text(document: Any) -> str:
        found: str = document.text
        return found

    text.__annotations__["return"] = str  # datatrove reads it, and `from __future__` makes text of it
    return module.ExactDedupConfig(text, lambda _: HIGHEST_PRIORITY, hashing())


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
