"""Stream the documents of a source: short ones dropped, held-out ones set aside, no more than the config says.

The same settings and files give the same documents in the same order. Without a validation or test split of its own, a
source gives up the documents whose hash falls into the held-out share, so a text is in one split whatever its place.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from checkpoints.redact import redact
from modularforge.config import DataConfig, SourceConfig
from modularforge.data.chat_template import Segment
from modularforge.data.examples import ExampleWriter
from modularforge.data.files import Span, find_files
from modularforge.data.formats import Labelled, hub_records, label_of, read_file, read_hub, read_records
from modularforge.errors import DataError

Split = Literal["train", "validation", "test"]
Files = Sequence[tuple[str, Span | None]]
"""Files by URL, each with the bytes in which begins what is read of it; None is all of it."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT: tuple[Split, ...] = ("validation", "test")
# Of a source capped at n training documents, held-out splits taken from them keep n / 10.
HELD_OUT_CAP_DIVISOR = 10


@dataclass(frozen=True)
class Document:
    """One text of the corpus and the label it is evaluated under; an example has its text in segments."""

    text: str
    label: str
    segments: tuple[Segment, ...] = ()
    is_chat: bool = False

    @property
    def identity(self) -> str:
        """What says which split it is in: of an example the prompt, so that a prompt is in one split."""
        return self.segments[0].text if self.segments else self.text


def read_documents(
    source: SourceConfig,
    split: Split,
    data: DataConfig,
    dropped: Counter[str] | None = None,
    writer: ExampleWriter | None = None,
    files: Files | None = None,
    found: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of one split of one source; raises DataError when there are none.

    `dropped`, when given, counts the texts under `data.min_article_length` by label. A `writer` makes examples of
    records. `files` are some of the split's, or spans of them, where others read the rest;
    `found` then counts documents that were given, and those that are of another split (`elsewhere`), and nothing is
    raised.
    """
    count, elsewhere, limit = 0, 0, document_limit(source, split, data)
    for document in _texts(source, split, files) if writer is None else _examples(source, split, writer, files):
        if writer is None and len(document.text) < data.min_article_length:
            if dropped is not None:
                dropped[document.label] += 1
        elif _home_split(document.identity, source, split, data) == split:
            yield document
            count += 1
            if count == limit:
                break
        else:
            elsewhere += 1
    if found is not None:
        found.update(documents=count, elsewhere=elsewhere)
    elif not count:
        raise no_documents(source, split, data, elsewhere)


def _texts(source: SourceConfig, split: Split, files: Files | None) -> Iterator[Document]:
    return (Document(text, label or source.name) for text, label in _read_split(source, split, files))


def _examples(source: SourceConfig, split: Split, writer: ExampleWriter, files: Files | None) -> Iterator[Document]:
    for record, origin in _read_records(source, split, writer.columns, files):
        label = label_of(record, source, origin) or source.name
        for segments in writer.write(record, origin):
            text = "".join(segment.text for segment in segments)
            yield Document(text, label, segments, writer.chat is not None)


def _read_records(
    source: SourceConfig, split: Split, columns: list[str], files: Files | None
) -> Iterator[tuple[Any, str]]:
    locations = getattr(source, split) or source.train
    if source.hub is not None:
        names = [locations] if isinstance(locations, str) else locations
        return (found for name in names for found in hub_records(name, source))
    urls = find_files(locations) if files is None else [url for url, _ in files]
    return (found for url in urls for found in read_records(url, source, columns))


def _read_split(source: SourceConfig, split: Split, files: Files | None) -> Iterator[Labelled]:
    locations = getattr(source, split) or source.train
    if source.hub is not None:
        names = [locations] if isinstance(locations, str) else locations
        return (labelled for name in names for labelled in read_hub(name, source))
    files = [(url, None) for url in find_files(locations)] if files is None else files
    return (labelled for url, span in files for labelled in read_file(url, source, span))


def _home_split(text: str, source: SourceConfig, split: Split, data: DataConfig) -> Split:
    """The split a document read for `split` belongs to; only the training files are divided."""
    if (split != "train" and getattr(source, split)) or (source.validation and source.test):
        return split
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64 / data.heldout_fraction
    for index, held_out in enumerate(HELD_OUT):
        if not getattr(source, held_out) and index <= position < index + 1:
            return held_out
    return "train"


def document_limit(source: SourceConfig, split: Split, data: DataConfig) -> int | None:
    """The most documents that a split of a source has; None for any number."""
    limit = data.max_documents_per_source
    if limit is None or split == "train":
        return limit
    if getattr(source, split):
        return None  # somebody chose these files to be measured on
    return max(1, limit // HELD_OUT_CAP_DIVISOR)


def no_documents(source: SourceConfig, split: Split, data: DataConfig, elsewhere: int) -> DataError:
    """What is wrong with a split of a source that has no documents, `elsewhere` of which are of another split."""
    wanted = f"source {source.name} must have {split} documents of at least {data.min_article_length} characters"
    if split == "train" and elsewhere:
        return DataError(
            f"{wanted}, but all {elsewhere} of them fell into the held-out shares; name validation and test files for "
            "it, or add documents"
        )
    if split == "train" or getattr(source, split):
        files = redact(str(getattr(source, split)))
        return DataError(f"{wanted}, but has none in {files:.300}; check data.sources and min_article_length")
    return DataError(
        f"{wanted}, but none of its training documents fell into the held-out share {data.heldout_fraction}; "
        f"name {split} files for it or raise data.heldout_fraction"
    )
