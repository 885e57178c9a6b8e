"""Text that others have tokenised: Megatron's `.bin` and `.idx`, NumPy's `.npy`, and bare ids, in and out.

Ids become text again with the tokenizer that made them, which the source names, and then are documents like all others:
they can be cleaned, clustered and tokenised anew, and the same tokenizer makes the same ids of them. Megatron's index
says where a document ends; elsewhere a special token does.

An `.idx` is `MMIDIDX`, version 1, a code of the type of the ids, numbers of sequences and of documents, the length of
each sequence (int32), its place in the `.bin` in bytes (int64), and the first sequence of each document (int64).
"""

# N tokens  S sequences  D documents

from __future__ import annotations

import functools
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoints import paths
from checkpoints.redact import redact
from modularforge.config import SourceConfig
from modularforge.data.compression import COPY_AGAIN, describe
from modularforge.data.files import open_bytes, real_location
from modularforge.data.token_files import TokenFile
from modularforge.data.tokenizer import parse_tokenizer, vocabulary_size
from modularforge.errors import DataError, one_line

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BARE = {"uint16": "<u2", "uint32": "<u4"}
FORMATS = ("megatron", "npy", *BARE)
CHUNK_TOKENS = 1 << 16
LONGEST_DOCUMENT = 1 << 20  # tokens; a longer one is cut, as long texts are
DOCUMENTS_AT_ONCE = 64
Ids = npt.NDArray[Any]


def read_tokens(url: str, source: SourceConfig, kind: str) -> Iterator[tuple[str, None]]:
    """The documents of a file of this format as text; raises DataError."""
    name = redact(url)
    if source.tokenizer is None:
        raise DataError(
            f"{name} holds ids, so source {source.name} must name the tokenizer that made them, but names none; set "
            "tokenizer to its tokenizer.json (a path or a URL, such as hf://OWNER/NAME/tokenizer.json)"
        )
    tokenizer = _tokenizer(real_location(source.tokenizer))
    if kind == "megatron":
        documents = _megatron_documents(url, name)
    else:
        special = np.array([i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special], np.int64)
        documents = _cut(_pieces(url, name, kind), special)
    return _texts(documents, tokenizer, name, source)


def _texts(
    documents: Iterator[Ids], tokenizer: Tokenizer, name: str, source: SourceConfig
) -> Iterator[tuple[str, None]]:
    vocab_size, done = vocabulary_size(tokenizer), 0
    while some := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
        for ids_N in some:
            _require_known(ids_N, vocab_size, name, done, source)
            done += len(ids_N)
        for text in tokenizer.decode_batch([ids_N.tolist() for ids_N in some], skip_special_tokens=True):
            yield text, None


def _require_known(ids_N: Ids, vocab_size: int, name: str, done: int, source: SourceConfig) -> None:
    wrong = np.flatnonzero((ids_N < 0) | (ids_N >= vocab_size))
    if len(wrong):
        raise DataError(
            f"{name} must hold ids below the {vocab_size} of its tokenizer, but token {done + int(wrong[0])} is "
            f"{ids_N[wrong[0]]}; set tokenizer of source {source.name} to the one that made them, or its format"
        )


def _cut(pieces: Iterable[Ids], special: npt.NDArray[np.int64]) -> Iterator[Ids]:
    """Documents of a stream of ids, each with the special token that ends it."""
    held: list[Ids] = []
    for piece in pieces:
        start = 0
        for end in np.flatnonzero(np.isin(piece, special)) + 1:
            yield np.concatenate([*held, piece[start:end]])
            held, start = [], int(end)
        held.append(piece[start:])
        if sum(map(len, held)) >= LONGEST_DOCUMENT:
            yield np.concatenate(held)
            held = []
    if any(map(len, held)):
        yield np.concatenate(held)


def _pieces(url: str, name: str, kind: str) -> Iterator[Ids]:
    """The ids of a `.npy` file, or of one that holds nothing else."""
    with open_bytes(url) as file:
        if kind == "npy":
            dtype, count = _array_header(file, name)
        else:
            dtype, size = np.dtype(BARE[kind]), _size(file)
            count = size // dtype.itemsize
            if size % dtype.itemsize:
                raise DataError(f"{name} must hold whole ids of {kind}, but has {size} bytes; {COPY_AGAIN}")
        _require_bytes(file, name, count * dtype.itemsize)
        for start in range(0, count, CHUNK_TOKENS):
            yield _ids(file, name, dtype, min(CHUNK_TOKENS, count - start))


def _array_header(file: Any, name: str) -> tuple[np.dtype[Any], int]:
    head = file.read(512)
    file.seek(0)
    if not head.startswith(b"\x93NUMPY"):
        what, _ = describe(head) or ("text" if head else "empty", "")
        raise DataError(f"{name} must be an array of NumPy (.npy), but is {what}; set the format of this source")
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except (ValueError, OSError) as error:
        raise DataError(f"{name} must be an array of NumPy (.npy), but {one_line(error)}; {COPY_AGAIN}") from error
    if dtype.kind not in "ui" or not 1 <= len(shape) <= 2 or (is_fortran and len(shape) > 1):
        raise DataError(
            f"{name} must be an array of ids (integers, in one row or row by row), but is of type {dtype} and shape "
            f"{shape}{', by columns' if is_fortran else ''}; save the ids"
        )
    return dtype, int(np.prod(shape))


@dataclass(frozen=True)
class _Index:
    """What an `.idx` says of its `.bin`."""

    dtype: np.dtype[Any]
    lengths_S: npt.NDArray[np.int32]
    starts_S: npt.NDArray[np.int64]
    firsts_D: npt.NDArray[np.int64]
    """The first sequence of each document, and one past the last."""


def _megatron_documents(url: str, name: str) -> Iterator[Ids]:
    stem = url.removesuffix(".idx").removesuffix(".bin")
    index = _read_index(f"{stem}.idx")
    binary, itemsize = redact(f"{stem}.bin"), index.dtype.itemsize
    with open_bytes(f"{stem}.bin") as file:
        ends_S = index.starts_S + index.lengths_S.astype(np.int64) * itemsize
        _require_bytes(file, binary, int(ends_S.max(initial=0)))
        for first, end in itertools.pairwise(index.firsts_D.tolist()):
            sequences = []
            for sequence in range(first, end):
                if file.tell() != index.starts_S[sequence]:
                    file.seek(int(index.starts_S[sequence]))
                sequences.append(_ids(file, binary, index.dtype, int(index.lengths_S[sequence])))
            yield np.concatenate([np.empty(0, index.dtype), *sequences])


def _read_index(url: str) -> _Index:
    """An `.idx`, checked; raises DataError."""
    name = redact(url)
    with open_bytes(url) as file:
        content = file.read()
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise DataError(
            f"{name} must be an index of Megatron token files (MMIDIDX), but is not; name the .idx of a .bin, or set "
            "the format of this source"
        )
    _, version, code, sequences, documents = HEADER.unpack_from(content)
    if version != VERSION:
        raise DataError(f"{name} must be an index of version {VERSION}, but is of {version}; write it anew")
    dtype = np.dtype(TYPES.get(code, "V1"))
    if dtype.kind not in "ui":
        raise DataError(
            f"{name} must be of integer ids (such as type 4, int32, or 8, uint16), but is of type {code}; write the "
            "token files anew"
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if len(content) not in (expected, expected + sequences):  # with a byte of mode for each sequence
        raise DataError(
            f"{name} must have {expected} bytes for its {sequences} sequences and {documents - 1} documents, but has "
            f"{len(content)}; {COPY_AGAIN}"
        )
    lengths_S = np.frombuffer(content, "<i4", sequences, HEADER.size)
    starts_S = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    firsts_D = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    is_ordered = documents and firsts_D[0] == 0 and firsts_D[-1] == sequences and (np.diff(firsts_D) >= 0).all()
    if not is_ordered or (lengths_S < 0).any() or (starts_S < 0).any():
        raise DataError(f"{name} must say where its documents begin, but goes back or beyond its end; {COPY_AGAIN}")
    return _Index(dtype, lengths_S, starts_S, firsts_D)


def _ids(file: Any, name: str, dtype: np.dtype[Any], count: int) -> Ids:
    content = file.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise DataError(f"{name} must be whole, but ended while it was read; {COPY_AGAIN}")
    found = np.frombuffer(content, dtype)
    return found.astype(np.int64) if dtype.itemsize == 8 else found


def _size(file: Any) -> int:
    size = int(file.seek(0, os.SEEK_END) or file.tell())
    file.seek(0)
    return size


def _require_bytes(file: Any, name: str, count: int) -> None:
    """What is read from here on must be there, before any of it is."""
    here = file.tell()
    size = _size(file)
    file.seek(here)
    if size < here + count:
        raise DataError(f"{name} must have {here + count} bytes, but has {size}; {COPY_AGAIN}")


@functools.lru_cache(maxsize=8)
def _tokenizer(location: str) -> Tokenizer:
    is_folder = paths.is_local(location) and paths.local_path(location).is_dir()
    url = paths.join(location, "tokenizer.json") if is_folder else location
    with open_bytes(url) as file:
        content = file.read()
    try:
        return parse_tokenizer(content.decode())
    except ValueError as error:
        raise DataError(
            f"{redact(url)} must be a tokenizer.json, but cannot be read ({one_line(error)}); name the file of the "
            "tokenizer that made the ids"
        ) from error


def export_megatron(files: Iterable[TokenFile], target: Path) -> Iterator[tuple[str, int, int]]:
    """Write each token file as `NAME.bin` and `NAME.idx`, a sequence for each document, ends and all.

    The index comes last: without it there is no token file. Yields names, documents and tokens. Raises DataError where
    one is there, or where the files hold examples.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        index = target / f"{file.name}.idx"
        if file.learned is not None:
            raise DataError(
                f"token file {file.name} must hold text, but holds examples, and Megatron's files cannot say what is "
                "learned; export prepared data of task: text"
            )
        if index.exists():
            raise DataError(f"{index} must not be there, but is; name another folder, or delete it")
        _write_megatron(file, index)
        yield file.name, file.num_documents, len(file.tokens)


def _write_megatron(file: TokenFile, index: Path) -> None:
    dtype = np.dtype("<u2" if file.tokens.dtype.itemsize == 2 else "<i4")
    with open(index.with_name(f"{file.name}.bin"), "wb") as out:
        for start in range(0, len(file.tokens), CHUNK_TOKENS):
            out.write(np.ascontiguousarray(file.tokens[start : start + CHUNK_TOKENS], dtype).data)
    code = next(code for code, name in TYPES.items() if np.dtype(name) == dtype)
    header = HEADER.pack(MAGIC, VERSION, code, file.num_documents, file.num_documents + 1)
    lengths, starts = file.lengths.astype("<i4"), file.offsets[:-1] * dtype.itemsize
    firsts = np.arange(file.num_documents + 1, dtype="<i8")
    paths.write_atomically(
        index, [header, lengths.tobytes(), starts.astype("<i8").tobytes(), firsts.tobytes()], replace=False
    )
