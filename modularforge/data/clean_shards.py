"""Take one shard of documents through steps of cleaning; count what they drop and change, and keep a few samples.

A shard is a Zstandard file of JSON lines, `text` and `label`. Beside it lies what was counted on the way; the shard is
written last, so that one that is there is finished.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.paths import write_atomically
from modularforge.config import CleanStepConfig
from modularforge.data.clean_steps import Apply, datatrove, make_steps
from modularforge.data.compression import decompress
from modularforge.data.corpus import Document, Split
from modularforge.errors import DataError, one_line

ENDING = ".jsonl.zst"
FOLDER = "documents"  # of a cleaned corpus
SAMPLES = 3  # of each step in each source
SAMPLE_CHARACTERS, BEFORE_THE_CHANGE = 600, 60


@dataclass(frozen=True)
class Task:
    """A shard to clean: texts with labels as they were read, or the shard of an earlier pass and what to leave out."""

    target: Path
    source: str
    split: str
    documents: list[tuple[str, str]] | Path
    removed: frozenset[int] = frozenset()


@dataclass
class Tally:
    """What happened to the documents of a shard."""

    source: str
    split: str
    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    steps: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def note(self, place: int, before: str, after: str, reason: str | None, label: str) -> None:
        """Count what the step at this place did to a text of the domain `label`."""
        if (counts := self.steps.get(str(place))) is None:  # for each text at each step: no Counter is made in vain
            counts = self.steps[str(place)] = Counter()
        counts["documents"] += 1
        if reason is None and after == before:
            return
        counts["changed" if reason is None else "dropped"] += 1
        if reason is not None:
            counts["dropped_bytes"] += len(before.encode())
            self.reasons.setdefault(str(place), Counter())[reason] += 1
        if sum(sample["place"] == place for sample in self.samples) < SAMPLES:
            domain = {"label": label} if label != self.source else {}
            sample = {"place": place, "source": self.source, **domain, "reason": reason}
            self.samples.append({**sample, **_excerpt(before, after, reason)})


def clean_shard(steps: Sequence[CleanStepConfig], scratch: Path, first: int, last: int, task: Task) -> Path:
    """Take a shard through the steps from `first` to `last`, unless that is done; returns where it lies."""
    import zstandard

    if task.target.exists():
        return task.target
    tally, lines = Tally(task.source, task.split), []
    documents = _without(task, first - 1, tally)
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder for each text
    for document in _kept(documents, make_steps(steps, scratch, task.source, first, last), steps, tally):
        lines.append(encode({"text": document.text, "label": document.metadata["label"]}).encode() + b"\n")
        _add(tally.kept, document.text)
    write_atomically(_tally_path(task.target), [json.dumps(vars(tally)).encode()], replace=True)
    write_atomically(task.target, [zstandard.compress(b"".join(lines))], replace=True)
    return task.target


def read_tally(shard: Path) -> Tally:
    """What was counted of a finished shard."""
    return load_tally(json.loads(_tally_path(shard).read_bytes()))


def load_tally(values: Mapping[str, Any]) -> Tally:
    """A tally of what was written as JSON."""
    return Tally(**{**values, "read": Counter(values["read"]), "kept": Counter(values["kept"])})


def records(path: Path) -> Iterator[dict[str, str]]:
    """The documents of a file of JSON lines."""
    with open(path, "rb") as file:
        lines = b"".join(decompress(file, ".zst", str(path))).split(b"\n")
    return (json.loads(line) for line in lines if line)


def read_cleaned(folder: Path, source: int, split: Split) -> Iterator[Document]:
    """The documents of a split of the source with this number in the settings."""
    return read_cleaned_files(sorted((folder / FOLDER).glob(f"{split}-{source:04d}-*{ENDING}")))


def read_cleaned_files(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of files of cleaned ones."""
    return (Document(record["text"], record["label"]) for path in paths for record in records(path))


def cleaned_names(names: Iterable[str], source: int, split: Split) -> list[str]:
    """Those of the files of cleaned documents that are of a split of the source with this number, in order."""
    return sorted(name for name in names if name.startswith(f"{FOLDER}/{split}-{source:04d}-"))


def read_shard(path: Path) -> Iterator[Any]:
    """The documents of a shard as datatrove has them."""
    return _documents((record["text"], record["label"]) for record in records(path))


def _documents(texts: Iterable[tuple[str, str]]) -> Iterator[Any]:
    make = datatrove("data").Document
    return (make(text, "", metadata={"label": label}) for text, label in texts)


def _without(task: Task, place: int, tally: Tally) -> Iterator[Any]:
    """The documents of a task but those that the step before this pass removes."""
    documents = _documents(task.documents) if isinstance(task.documents, list) else read_shard(task.documents)
    for index, document in enumerate(documents):
        _add(tally.read, document.text)
        if isinstance(task.documents, Path):
            reason = "copy" if index in task.removed else None
            tally.note(place, document.text, document.text, reason, document.metadata["label"])
        if index not in task.removed:
            yield document


def _add(amount: Counter[str], text: str) -> None:
    amount["documents"] += 1
    amount["bytes"] += len(text) if text.isascii() else len(text.encode())


def _kept(
    documents: Iterable[Any], made: Mapping[int, Apply], steps: Sequence[CleanStepConfig], tally: Tally
) -> Iterator[Any]:
    for document in documents:
        reason = None
        for place, apply in made.items():
            before = document.text
            try:
                reason = apply(document) or (None if document.text.strip() else "empty")
            except Exception as error:  # rules are a library's, with options that only a document shows to be wrong
                raise DataError(
                    f"step {steps[place].step} of data.clean must take every document of {tally.split} of source "
                    f"{tally.source}, but not the one that begins {before[:60]!r} ({one_line(error)}); change its "
                    "options, or leave the document out"
                ) from error
            tally.note(place, before, document.text, reason, document.metadata["label"])
            if reason is not None:
                break
        if reason is None:
            yield document


def _excerpt(before: str, after: str, reason: str | None) -> dict[str, str | None]:
    """The beginning of a text that is dropped; of one that is changed the first place where it is."""
    if reason is not None:
        return {"before": before[:SAMPLE_CHARACTERS], "after": None}
    length = min(len(before), len(after))
    change = next((place for place in range(length) if before[place] != after[place]), length)
    start = max(0, change - BEFORE_THE_CHANGE)
    return {"before": before[start:][:SAMPLE_CHARACTERS], "after": after[start:][:SAMPLE_CHARACTERS]}


def _tally_path(shard: Path) -> Path:
    return shard.with_name(shard.name.removesuffix(ENDING) + ".json")
