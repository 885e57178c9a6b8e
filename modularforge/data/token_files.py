"""Token ids on disk, written once as a stream, read as memory maps; and what describes prepared data beside them.

A token file NAME in a folder is ``NAME.tokens.bin`` (little-endian uint16, or uint32 for vocabularies over 65536),
``NAME.offsets.npy`` (int64, where each document starts, and the end) and ``NAME.labels.npy`` (uint16 label ids). Of
examples, each of which is a document, ``NAME.learned.bin`` says which tokens are learned (a byte each, 1 or 0).
Of a large corpus the tokens lie in shards ``NAME-00000.tokens.bin`` …: ``NAME.shards.npy`` (int64) says how many each
has, and ``NAME.spans.npy`` (int64, [P, 2]) which of them, one shard after another, are those of the file. Partitions of
such a corpus are spans of its training shards.
``metadata.json`` and ``partitions.json`` are checked before anybody computes with what they say.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from checkpoints.parsing import parse_object
from modularforge.data.token_streams import Indices, JoinedTokens, SpannedTokens, StreamedTokens, let_go, merged_spans
from modularforge.data.tokenizer import EOS, MAX_VOCABULARY
from modularforge.errors import DataError, one_line

Tokens = npt.NDArray[Any]
LABEL_LIMIT = 1 << 16
ROW_NAME = "partition.json"  # of a partition that is an artifact of its own: what is said of it
COPY_DOCUMENTS = 1024  # in one piece
MAPPED_BYTES = 1 << 26  # an index of so many bytes is mapped into memory, a smaller one is loaded
CHECKED_AT_ONCE = 1 << 20
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class TokenFile:
    """Documents as token ids: `tokens` is memory-mapped, document i lies between offsets i and i + 1."""

    name: str
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint16]
    learned: Tokens | None = None
    is_apart: bool = False
    """Its documents of text are read one by one, as examples of which all is learned."""

    @property
    def has_examples(self) -> bool:
        """Whether its streams keep the bounds of documents."""
        return self.is_apart or self.learned is not None

    @property
    def num_documents(self) -> int:
        """How many documents the file holds."""
        return len(self.labels)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, `<bos>` and `<eos>` included."""
        return np.diff(self.offsets)

    def document(self, index: int) -> Tokens:
        """Token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def learned_of(self, index: int) -> Tokens:
        """Which tokens of one example are learned."""
        assert self.learned is not None
        return self.learned[self.offsets[index] : self.offsets[index + 1]]

    def stream(self, documents: npt.NDArray[np.int64]) -> Tokens | ExampleTokens:
        """These documents one after another; examples keep their bounds and what of them is learned."""
        spans = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in documents]
        streamed: Any = self.tokens
        if isinstance(streamed, StreamedTokens):
            tokens = streamed.read([(span.start, span.stop) for span in spans])
        else:
            tokens = np.concatenate([self.tokens[span] for span in spans]) if spans else np.empty(0, self.tokens.dtype)
        offsets = _offsets(self.lengths[documents])
        if self.learned is None:
            return ExampleTokens.of_text(tokens, offsets) if self.is_apart else tokens
        learned = np.concatenate([self.learned[span] for span in spans]) if spans else np.empty(0, np.uint8)
        return ExampleTokens(tokens, offsets, learned)

    @property
    def whole(self) -> Tokens | ExampleTokens:
        """All documents as one stream."""
        if self.learned is None:
            return ExampleTokens.of_text(self.tokens, self.offsets) if self.is_apart else self.tokens
        return ExampleTokens(self.tokens, self.offsets, self.learned)


@dataclass(frozen=True)
class ExampleTokens:
    """A stream of examples: `tokens` as in a token file, example i between offsets i and i + 1, and what is learned.

    Documents of text are examples too: all of them is learned, and where one is too long it goes on in another row.
    """

    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    learned: Tokens
    is_text: bool = False

    @staticmethod
    def of_text(tokens: Tokens, offsets: npt.NDArray[np.int64]) -> ExampleTokens:
        """Documents of text."""
        return ExampleTokens(tokens, offsets, np.broadcast_to(np.uint8(1), len(tokens)), is_text=True)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def first(self, tokens: int) -> ExampleTokens:
        """The first examples that together have about so many tokens, at least one; of text so many, or all."""
        if self.is_text:
            ends = np.minimum(self.offsets[: int(np.searchsorted(self.offsets, tokens)) + 1], tokens)
            return ExampleTokens.of_text(self.tokens[: ends[-1]], ends)
        count = max(1, int(np.searchsorted(self.offsets, tokens, side="right")) - 1)
        end = self.offsets[min(count, self.num_examples)]
        return ExampleTokens(self.tokens[:end], self.offsets[: count + 1], self.learned[:end])

    @staticmethod
    def among(streams: Mapping[str, Stream]) -> dict[str, ExampleTokens]:
        """Those of the streams that are of examples."""
        return {label: stream for label, stream in streams.items() if isinstance(stream, ExampleTokens)}

    @staticmethod
    def joined(parts: Sequence[ExampleTokens]) -> ExampleTokens:
        """Several streams one after another."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        tokens, learned = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "learned"))
        return ExampleTokens(tokens, _offsets(lengths), learned, all(part.is_text for part in parts))


Stream = Any
"""What a model learns from or is measured on: `Tokens`, ids of text without bounds, or `ExampleTokens`."""


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


class TokenFileWriter:
    """Writes a token file as its documents come; the offsets are written when the `with` block ends well."""

    def __init__(self, folder: Path, name: str, vocab_size: int, has_learned: bool = False) -> None:
        self.folder = folder
        self.name = name
        self.dtype = token_dtype(vocab_size)
        self.offsets = array("q", [0])
        self.labels = array("H")
        self.file = open(folder / f"{name}.tokens.bin", "wb")  # noqa: SIM115 closed by __exit__
        self.learned = open(folder / f"{name}.learned.bin", "wb") if has_learned else None  # noqa: SIM115

    def add(
        self, tokens: Tokens, lengths: npt.NDArray[np.int64], labels: npt.NDArray[Any], learned: Tokens | None = None
    ) -> None:
        """Append documents: their tokens one after another, the length and label of each, and what is learned."""
        self.file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        if self.learned is not None:
            self.learned.write(np.ascontiguousarray(learned, dtype=np.uint8).data)
        self.offsets.extend((self.offsets[-1] + np.cumsum(lengths)).tolist())
        self.labels.extend(labels.tolist())

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self.offsets[-1]

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.learned is not None:
            self.learned.close()
        if error is None:
            np.save(self.folder / f"{self.name}.offsets.npy", np.array(self.offsets, dtype="<i8"))
            np.save(self.folder / f"{self.name}.labels.npy", np.array(self.labels, dtype="<u2"))


def write_documents(
    file: TokenFile, documents: npt.NDArray[np.int64], folder: Path, name: str, vocab_size: int
) -> None:
    """Write these documents of a token file as another one, of this name."""
    lengths, labels = file.lengths, file.labels
    with TokenFileWriter(folder, name, vocab_size, file.learned is not None) as writer:
        for start in range(0, len(documents), COPY_DOCUMENTS):
            chosen = documents[start : start + COPY_DOCUMENTS]
            stream = file.stream(chosen)
            tokens, learned = (stream.tokens, stream.learned) if isinstance(stream, ExampleTokens) else (stream, None)
            writer.add(tokens, lengths[chosen], labels[chosen], learned)
            let_go(file.tokens)


def write_index(folder: Path, name: str, offsets: Indices, labels: npt.NDArray[Any], spans_P2: Indices) -> None:
    """Write what is a token file but its tokens, which are these spans of shards."""
    np.save(folder / f"{name}.offsets.npy", offsets.astype("<i8"))
    np.save(folder / f"{name}.labels.npy", labels.astype("<u2"))
    np.save(folder / f"{name}.spans.npy", spans_P2.astype("<i8"))


def write_spans(file: TokenFile, documents: npt.NDArray[np.int64], folder: Path, name: str) -> None:
    """Write these documents of a token file in shards as another one of this name: as spans, without their tokens."""
    tokens: Any = file.tokens
    assert isinstance(tokens, SpannedTokens)
    lengths = file.lengths[documents]
    spans_P2 = merged_spans(tokens.places(file.offsets[documents]), lengths)
    write_index(folder, name, _offsets(lengths), file.labels[documents], spans_P2)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of the format that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def open_token_file(
    folder: Path, name: str, ids: Callable[[int], Any] | None = None, learned: Any | None = None
) -> TokenFile:
    """Memory-map the token file `name` of a folder; raises DataError when it is missing, truncated or inconsistent.

    Where its tokens, and what is learned of them, are not in the folder, `ids` gives so many.
    """
    offsets = _load_array(folder / f"{name}.offsets.npy", "<i8")
    labels = _load_array(folder / f"{name}.labels.npy", "<u2")
    if len(offsets) and (offsets[0] != 0 or _goes_back(offsets)):
        raise DataError(
            f"{folder / name}.offsets.npy must begin at 0 and never go back, but does not; run prepare-data again"
        )
    count, documents = int(offsets[-1]) if len(offsets) else -1, len(offsets) - 1
    if ids is None and (folder / f"{name}.shards.npy").exists():
        spans_P2, counts = read_spans(folder, name), read_shard_counts(folder, name)
        ids = lambda _: SpannedTokens(shards_in(folder, name, counts), spans_P2)  # noqa: E731
        if (folder / f"{shard_name(name, 0)}.learned.bin").exists():
            learned = SpannedTokens(shards_in(folder, name, counts, "learned.bin"), spans_P2)
    if ids is not None:
        tokens = ids(count)
        if len(tokens) != count or len(labels) != documents:
            found = f"{len(tokens)} tokens and {documents} documents"
            raise truncated(f"the shards of {folder / name}", f"{count} tokens and {len(labels)} documents", found)
        return TokenFile(name, tokens, offsets, labels, learned)
    path = folder / f"{name}.tokens.bin"
    size = path.stat().st_size if path.exists() else -1
    if len(labels) != documents or size not in (2 * count, 4 * count):
        found = f"{size} bytes and {documents} documents"
        raise truncated(str(path), f"{count} tokens and {len(labels)} documents", found)
    tokens = _mapped(path, id_type(path, size, count), count)
    return TokenFile(name, tokens, offsets, labels, _learned(folder / f"{name}.learned.bin", count))


def id_type(path: Any, size: int, count: int) -> np.dtype[Any]:
    """Of `count` ids in a file of so many bytes; raises DataError where they are of no type."""
    if size not in (2 * count, 4 * count):
        raise truncated(str(path), f"{count} tokens", f"{size} bytes")
    return np.dtype("<u2" if size == 2 * count else "<u4")


def truncated(path: str, expected: str, found: str) -> DataError:
    """What is wrong with a file of tokens that has not what its index says."""
    return DataError(
        f"{path} must hold the {expected} that its offsets and labels say, but has {found}; it is truncated: run "
        "prepare-data again"
    )


def _goes_back(offsets: npt.NDArray[np.int64]) -> bool:
    """Whether an offset is below the one before; looked at piece by piece, since an index may be larger than memory."""
    pieces = (offsets[start : start + CHECKED_AT_ONCE + 1] for start in range(0, len(offsets), CHECKED_AT_ONCE))
    return any(bool((np.diff(piece) < 0).any()) for piece in pieces)


def shard_name(name: str, number: int) -> str:
    """What the shard with this number of a token file is called."""
    return f"{name}-{number:05d}"


def read_shard_counts(folder: Path, name: str) -> Indices:
    """Tokens of each shard."""
    return _load_array(folder / f"{name}.shards.npy", "<i8")


def read_spans(folder: Path, name: str) -> Indices:
    """Which tokens of the shards are those of a token file, [P, 2]; raises DataError."""
    spans_P2 = _load_array(folder / f"{name}.spans.npy", "<i8", 2)
    if spans_P2.shape[1:] != (2,) or (spans_P2[:, 0] > spans_P2[:, 1]).any() or (spans_P2 < 0).any():
        raise DataError(f"{folder / name}.spans.npy must hold begins and ends, but does not; run prepare-data again")
    return spans_P2


def shards_in(folder: Path, name: str, counts: Indices, ending: str = "tokens.bin") -> JoinedTokens:
    """The shards of a token file, one after another, from files of a folder."""
    return shards_of(counts, lambda number: folder / f"{shard_name(name, number)}.{ending}", ending)


def shards_of(counts: Indices, file_of: Callable[[int], Path], ending: str = "tokens.bin") -> JoinedTokens:
    """The same of files wherever they are when they are opened."""
    sized = next((number for number, count in enumerate(counts) if count), None)
    path = file_of(sized) if sized is not None else None
    width = np.dtype(np.uint8) if ending != "tokens.bin" else np.dtype("<u2")
    if path is not None and ending == "tokens.bin":
        width = id_type(path, path.stat().st_size, int(counts[sized]))
    return JoinedTokens(lambda number: map_part(file_of(number), width, int(counts[number])), counts.tolist(), width)


def map_part(path: Path, dtype: np.dtype[Any], count: int) -> Tokens:
    """A shard's file of so many ids; raises DataError when it has not so many."""
    size = path.stat().st_size if path.exists() else -1
    if size != count * dtype.itemsize:
        raise truncated(str(path), f"{count} tokens", f"{size} bytes")
    return np.asarray(_mapped(path, dtype, count))


def _learned(path: Path, count: int) -> Tokens | None:
    """Which tokens are learned, where that is said; raises DataError when it is not said of each."""
    if not path.exists():
        return None
    if path.stat().st_size != count:
        raise DataError(
            f"{path} must say of each of the {count} tokens whether it is learned, but has {path.stat().st_size} "
            "bytes; it is truncated: run prepare-data again"
        )
    return _mapped(path, np.dtype(np.uint8), count)


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> Tokens:
    try:
        return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path} must be readable, but {one_line(error)}; fix its permissions") from error


def _load_array(path: Path, dtype: str, dimensions: int = 1) -> npt.NDArray[Any]:
    try:
        content: npt.NDArray[Any] = np.load(path, mmap_mode="r" if path.stat().st_size > MAPPED_BYTES else None)
        if not isinstance(content, np.ndarray) or content.ndim != dimensions or content.dtype != np.dtype(dtype):
            raise ValueError(f"it must be a list of type {dtype}")
        return np.asarray(content)
    except Exception as error:  # numpy evaluates the header, which may fail in many ways
        raise DataError(
            f"{path} must be part of a token file, but cannot be read ({one_line(error)}); run prepare-data again"
        ) from error


class _Section(BaseModel):
    """Entries that we read; others are allowed, and kept."""

    model_config = ConfigDict(extra="ignore", strict=True)


class CorpusMetadata(_Section):
    """Of prepared data."""

    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    end_token: int = Field(EOS, ge=0, lt=MAX_VOCABULARY)
    labels: list[str] = Field(max_length=LABEL_LIMIT)


class PartitionRow(_Section):
    """Of one partition."""

    documents: Count
    tokens: Count
    tokens_by_label: dict[str, Count]
    top_words: list[str] = []


class PartitionsSummary(_Section):
    """Of all partitions."""

    partitions: list[PartitionRow]


S = TypeVar("S", bound=_Section)


def check_metadata(content: bytes, origin: str) -> dict[str, Any]:
    """metadata.json of prepared data; raises DataError. `origin` names it."""
    return _checked(CorpusMetadata, content, origin)[0]


def read_partitions(content: bytes, origin: str) -> list[PartitionRow]:
    """The rows of partitions.json; raises DataError."""
    return _checked(PartitionsSummary, content, origin)[1].partitions


def read_row(content: bytes, origin: str) -> PartitionRow:
    """The row of one partition that is an artifact of its own; raises DataError."""
    return _checked(PartitionRow, content, origin)[1]


def _checked(kind: type[S], content: bytes, origin: str) -> tuple[dict[str, Any], S]:
    try:
        values = parse_object(content)
        return values, kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"])
        reason = f"{name}: {found['msg']}"
    except ValueError as error:
        reason = str(error)
    raise DataError(
        f"{origin} must say what was prepared, but cannot be read ({one_line(reason)}); run prepare-data again in "
        "another place"
    )
