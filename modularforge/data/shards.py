"""Tokenise a stream of documents in shards that survive a kill.

A shard is some 8 MiB of text, cut at the same documents on every run and named by a hash of its texts. It is written in
one atomic step; a rerun reads the corpus again but tokenises only shards that are not there. Three things overlap:
reading, tokenising (which uses all cores), and converting and writing.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from checkpoints.paths import write_atomically
from modularforge.data.background import in_background
from modularforge.data.corpus import Document
from modularforge.data.examples import Encoded, ExampleEncoder
from modularforge.data.token_files import token_dtype
from modularforge.data.tokenizer import EOS, encode_documents, vocabulary_size

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
    learned: npt.NDArray[np.uint8] | None = None
    """Of examples: which tokens are learned."""


@dataclass(frozen=True)
class _Group:
    """The documents of a shard before they are tokenised."""

    path: Path
    documents: list[Document]
    text_bytes: list[int]


def tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    end_token: int = EOS,
    examples: ExampleEncoder | None = None,
) -> Iterator[Shard]:
    """The shards of a stream of documents, each as the tokenizer encodes it (`<bos>` text) and `end_token`.

    Those already in `folder` are only loaded. It belongs to one tokenizer: shards of another must not lie in it.
    `examples` says how they become tokens where they are examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = _encode(in_background(grouped(documents, folder, name), depth=1), tokenizer, examples)
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
        learned = content.get("learned")
        return Shard(content["tokens"], content["lengths"], content["text_bytes"], content["labels"], names, learned)


@dataclass
class _Parts:
    """The tokens of a shard while its batches come."""

    end_token: int
    tokens: list[npt.NDArray[Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    learned: list[npt.NDArray[np.uint8]] = field(default_factory=list)

    def add(self, encodings: Sequence[Encoding | npt.NDArray[np.uint32] | Encoded], dtype: np.dtype[Any]) -> None:
        for encoding in encodings:
            if isinstance(encoding, np.ndarray):
                tokens = encoding.astype(dtype)
                if tokens[-1] != self.end_token:
                    tokens = np.append(tokens, dtype.type(self.end_token))
            else:
                if isinstance(encoding, tuple):
                    ids, learned = encoding
                    self.learned.append(np.array(learned, np.uint8))
                else:
                    ids = encoding.ids
                if ids[-1:] != [self.end_token]:  # some pretrained tokenizers put it there themselves
                    ids.append(self.end_token)
                tokens = np.array(ids, dtype)
            self.tokens.append(tokens)
            self.lengths.append(len(tokens))


def grouped(documents: Iterable[Document], folder: Path, name: str) -> Iterator[_Group]:
    """Cut the stream into shards after the document that fills each, and name them by what they hold."""
    held: list[Document] = []
    text_bytes: list[int] = []
    digest, filled, index = hashlib.blake2b(digest_size=12), 0, 0
    for document in documents:
        content = document.text.encode()
        held.append(document)
        text_bytes.append(len(content))
        filled += len(content)
        digest.update(f"{len(content)} {document.label}\n".encode() + content)
        if document.segments:
            pieces = [(len(segment.text), segment.is_learned) for segment in document.segments]
            digest.update(repr((document.is_chat, pieces)).encode())
        if filled >= SHARD_BYTES:
            yield _Group(folder / f"{name}-{index:06d}-{digest.hexdigest()}.npz", held, text_bytes)
            held, text_bytes = [], []
            digest, filled, index = hashlib.blake2b(digest_size=12), 0, index + 1
    if held:
        yield _Group(folder / f"{name}-{index:06d}-{digest.hexdigest()}.npz", held, text_bytes)


def _encode(
    groups: Iterator[_Group], tokenizer: Tokenizer, examples: ExampleEncoder | None
) -> Iterator[tuple[_Group, Sequence[Encoding | npt.NDArray[np.uint32] | Encoded], bool]]:
    """Encodings of each group in batches, and whether a batch is the group's last; none of a finished shard."""
    for group in groups:
        if group.path.exists():
            yield group, [], True
            continue
        start, filled, last = 0, 0, len(group.documents) - 1
        for index, size in enumerate(group.text_bytes):
            filled += size
            if filled >= BATCH_BYTES or index == last:
                batch = group.documents[start : index + 1]
                if examples is None:
                    yield group, encode_documents(tokenizer, [document.text for document in batch]), index == last
                else:
                    yield group, [examples.encode(item.segments, item.is_chat) for item in batch], index == last
                start, filled = index + 1, 0


def _write_shard(group: _Group, parts: _Parts) -> None:
    labels = [document.label for document in group.documents]
    names = sorted(set(labels))
    learned: dict[str, Any] = {"learned": np.concatenate(parts.learned)} if parts.learned else {}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        tokens=np.concatenate(parts.tokens),
        lengths=np.array(parts.lengths, np.int64),
        text_bytes=np.array(group.text_bytes, np.int64),
        labels=np.searchsorted(names, labels).astype(np.int64),
        names=np.array(names),
        **learned,
    )
    write_atomically(group.path, [buffer.getvalue()], replace=True)
