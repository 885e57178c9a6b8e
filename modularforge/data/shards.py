"""Tokenise a stream of documents in shards that survive a kill.

A shard is some 8 MiB of text, cut at the same documents on every run and named by a hash of its texts. It is written in
one atomic step; a rerun reads the corpus again but tokenises only shards that are not there. Three things overlap:
reading, tokenising (which uses all cores), and converting and writing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from checkpoints.paths import write_atomically
from modularforge.data.background import in_background
from modularforge.data.corpus import Document
from modularforge.data.token_files import token_dtype
from modularforge.data.tokenizer import EOS, encode_texts, vocabulary_size

SHARD_BYTES = 8 << 20
# An Encoding takes over 100 bytes a token, so a shard goes through the tokenizer in smaller batches.
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """Tokenised documents: tokens one after another; tokens, text bytes and label (an index of `names`) of each."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    names: list[str]


@dataclass(frozen=True)
class _Group:
    """The documents of a shard before they are tokenised."""

    path: Path
    texts: list[str]
    labels: list[str]
    text_bytes: list[int]


def tokenise(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, name: str, end_token: int = EOS
) -> Iterator[Shard]:
    """The shards of a stream of documents, each as the tokenizer encodes it (`<bos>` text) and `end_token`.

    Those already in `folder` are only loaded. It belongs to one tokenizer: shards of another must not lie in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = _encode(in_background(_group(documents, folder, name), depth=1), tokenizer)
    dtype, parts = token_dtype(vocabulary_size(tokenizer)), _Parts(end_token)
    for group, encodings, is_last in in_background(batches):
        parts.add(encodings, dtype)
        if is_last and not group.path.exists():
            _write_shard(group, parts)
        if is_last:
            parts = _Parts(end_token)
            yield read_shard(group.path)


def read_shard(path: Path) -> Shard:
    """Load one shard file."""
    with np.load(path) as content:
        names = content["names"].tolist()
        return Shard(content["tokens"], content["lengths"], content["text_bytes"], content["labels"], names)


@dataclass
class _Parts:
    """The tokens of a shard while its batches come."""

    end_token: int
    tokens: list[npt.NDArray[Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, encodings: list[Encoding], dtype: np.dtype[Any]) -> None:
        for encoding in encodings:
            ids = encoding.ids
            if ids[-1:] != [self.end_token]:  # some pretrained tokenizers put it there themselves
                ids.append(self.end_token)
            self.tokens.append(np.array(ids, dtype))
            self.lengths.append(len(ids))


def _group(documents: Iterable[Document], folder: Path, name: str) -> Iterator[_Group]:
    """Cut the stream into shards after the document that fills each, and name them by what they hold."""
    texts: list[str] = []
    labels: list[str] = []
    text_bytes: list[int] = []
    digest, filled, index = hashlib.blake2b(digest_size=12), 0, 0
    for document in documents:
        content = document.text.encode()
        texts.append(document.text)
        labels.append(document.label)
        text_bytes.append(len(content))
        filled += len(content)
        digest.update(f"{len(content)} {document.label}\n".encode() + content)
        if filled >= SHARD_BYTES:
            yield _Group(folder / f"{name}-{index:06d}-{digest.hexdigest()}.npz", texts, labels, text_bytes)
            texts, labels, text_bytes = [], [], []
            digest, filled, index = hashlib.blake2b(digest_size=12), 0, index + 1
    if texts:
        yield _Group(folder / f"{name}-{index:06d}-{digest.hexdigest()}.npz", texts, labels, text_bytes)


def _encode(groups: Iterator[_Group], tokenizer: Tokenizer) -> Iterator[tuple[_Group, list[Encoding], bool]]:
    """Encodings of each group in batches, and whether a batch is the group's last; none of a finished shard."""
    for group in groups:
        if group.path.exists():
            yield group, [], True
            continue
        start, filled, last = 0, 0, len(group.texts) - 1
        for index, size in enumerate(group.text_bytes):
            filled += size
            if filled >= BATCH_BYTES or index == last:
                yield group, encode_texts(tokenizer, group.texts[start : index + 1]), index == last
                start, filled = index + 1, 0


def _write_shard(group: _Group, parts: _Parts) -> None:
    names = sorted(set(group.labels))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        tokens=np.concatenate(parts.tokens),
        lengths=np.array(parts.lengths, np.int64),
        text_bytes=np.array(group.text_bytes, np.int64),
        labels=np.searchsorted(names, group.labels).astype(np.int64),
        names=np.array(names),
    )
    write_atomically(group.path, [buffer.getvalue()], replace=True)
