"""Execute a merge plan: read spans of bytes, check their hashes, convert, write files one after another.

Memory is a few chunks, whatever the size of the model and the number of experts; nothing here imports torch. Tensors
that follow each other in their source are fetched together. Hashing runs beside the writing: of the tensors, whose
hashes on the way in are those on the way out where no byte changes, and of the file.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from checkpoints import ArtifactWriter, FileEntry, digests, paths
from checkpoints.digests import BLAKE3, Hash
from checkpoints.folder import FileSpan, OpenFile
from checkpoints.parallel import consumer, in_order
from checkpoints.safetensors import ITEM_BYTES, TensorSpan
from checkpoints.screen import Progress, progress
from modularforge.assembly.plan import LowRank, MergePlan, OutputFile, OutputTensor
from modularforge.assembly.values import converted, values_of, widened
from modularforge.errors import DataError, MismatchError

CHUNK_BYTES = 1 << 20  # stays in the processor's cache between reading, hashing and writing
CHUNKS_OF_A_COPY = 8
REQUEST_BYTES = 8 << 20  # of a store that is far away
REQUESTS_AHEAD = 8  # to hide its latency
CHUNKS_AHEAD = 16  # that wait to be hashed: what bounds memory where the disk is faster than hashing
OPEN_FILES = 64  # of any number of experts; a process may often have no more than 1024

Data = bytes | memoryview
Content = Data | FileSpan
Taker = Callable[[Any], None]
LowRankValues = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a tensor's source; of whole rows where the tensor grows or something is added."""

    name: str
    tensor: OutputTensor
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.end == self.tensor.span.length

    @property
    def rows(self) -> tuple[int, int]:
        """The rows it holds of a matrix that is read by rows."""
        width = self.tensor.span.shape[1] * ITEM_BYTES[self.tensor.span.dtype]
        return self.start // width, self.end // width


@dataclass(frozen=True)
class Request:
    """Pieces that lie behind each other in one file: its bytes [start, start + length)."""

    url: str
    start: int
    length: int
    pieces: tuple[Piece, ...]


def execute(plan: MergePlan, writer: ArtifactWriter) -> None:
    """Write all weight files of the plan; those that an interrupted run of the same artifact finished are kept."""
    writer.require_space(sum(file.size for file in plan.files if not writer.is_written(file.name)))
    with progress("assemble", plan.size, "bytes") as bar:
        for file in plan.files:
            if not writer.is_written(file.name):
                write_file(file, writer, bar)


def write_file(file: OutputFile, writer: ArtifactWriter, bar: Progress | None = None) -> FileEntry:
    """Write one weight file; raises MismatchError when a source tensor is not what its manifest says."""
    hashes = _Hashes()
    with ExitStack() as stack:
        check, count = hashes.in_background(stack)
        sources = stack.enter_context(Sources())

        # By sha256, hashing takes longer than all of the reading and writing, so that one more thread has to read.
        copies = paths.is_local(writer.url) and hashes.file.algorithm == BLAKE3

        def chunks() -> Iterator[Content]:
            count((None, file.header, False))
            yield file.header
            for piece, content in sources.read(file, copies):
                if not isinstance(content, FileSpan):
                    check((piece, content))
                for out, ends in _on_the_way(piece, content, sources):
                    count((piece, out, ends))
                    yield out
                    if bar:
                        bar.advance(len(out))
                hashes.raise_problem()

        def finish() -> FileEntry:
            stack.close()  # everything has been hashed
            hashes.raise_problem()
            return FileEntry(file.size, hashes.file.text(), dict(sorted(hashes.tensors.items())))

        # Spans of files are written as any chunk is, on folders alone.
        return writer.write_known(file.name, cast(Iterator[Data], chunks()), file.size, finish)


def requests(file: OutputFile, most: int) -> Iterator[Request]:
    """All that is read for a file, in its order; each of `most` bytes, or of one piece."""
    joined: list[Piece] = []
    length = 0
    for piece in _pieces(file):
        size = piece.end - piece.start
        if joined and (length + size > most or _place(joined[0], length) != _place(piece)):
            yield Request(*_place(joined[0]), length, tuple(joined))
            joined, length = [], 0
        joined.append(piece)
        length += size
    if joined:
        yield Request(*_place(joined[0]), length, tuple(joined))


def _place(piece: Piece, behind: int = 0) -> tuple[str, int]:
    """The file of a piece, and the place of its first byte there or of one that is so far behind."""
    return piece.tensor.span.url, piece.tensor.span.start + piece.start + behind


def _pieces(file: OutputFile, copies: bool = False) -> Iterator[Piece]:
    for name, tensor in file.tensors:
        span = tensor.span
        has_rows = tensor.columns or tensor.rows or tensor.added
        unit = ITEM_BYTES[span.dtype] * (span.shape[1] if has_rows else 1)
        step = max(CHUNK_BYTES // unit, 1) * unit * (CHUNKS_OF_A_COPY if copies and tensor.is_copy else 1)
        for start in range(0, max(span.length, 1), step):
            yield Piece(name, tensor, start, min(start + step, span.length))


def _on_the_way(piece: Piece, content: Content, sources: Sources) -> Iterator[tuple[Content, bool]]:
    """What is written for a piece, and whether the tensor ends with it."""
    tensor = piece.tensor
    if tensor.is_copy:
        yield content, piece.is_last
        return
    assert not isinstance(content, FileSpan), "only what is copied is not looked at"
    if tensor.added:
        content, source = _with_added(piece, content, sources.low_rank(tensor.added)), "F32"
    else:
        source = tensor.span.dtype
    values = converted(content, source, tensor.dtype)
    if tensor.columns:
        beside = _beside(piece, sources) if tensor.beside else None
        values = widened(values.reshape(-1, tensor.span.shape[1]), tensor.columns, beside)
    yield _bytes_of(values), piece.is_last and not tensor.rows
    if piece.is_last and tensor.rows:
        yield _below(tensor, sources), True


def _with_added(piece: Piece, content: Data, low_rank: LowRankValues) -> Data:
    """A piece's values in float32 with those of a low-rank matrix added."""
    (a_RI, b_OR), (first, end) = low_rank, piece.rows
    rows_PI = converted(content, piece.tensor.span.dtype, "F32").reshape(end - first, piece.tensor.span.shape[1])
    return _bytes_of(rows_PI + b_OR[first:end] @ a_RI)


def _below(tensor: OutputTensor, sources: Sources) -> Data:
    """The rows below a matrix, in the output's type."""
    if tensor.below is None:
        return bytes(tensor.rows * tensor.shape[1] * ITEM_BYTES[tensor.dtype])
    content = sources.bytes_of(tensor.below, 0, tensor.below.length)
    return _bytes_of(converted(content, tensor.below.dtype, tensor.dtype))


def _beside(piece: Piece, sources: Sources) -> Any:
    """The rows of the matrix beside a piece, in the output's type."""
    span = piece.tensor.beside
    assert span is not None
    width = span.shape[1] * ITEM_BYTES[span.dtype]
    first, end = piece.rows
    content = sources.bytes_of(span, first * width, end * width)
    return converted(content, span.dtype, piece.tensor.dtype).reshape(end - first, span.shape[1])


def _bytes_of(values: Any) -> memoryview:
    array: Any = np.ascontiguousarray(values)
    return memoryview(array).cast("B")


@dataclass
class _Hashes:
    """Hashes of the sources' tensors, of the tensors as written and of the file."""

    file: Hash = field(default_factory=digests.new)
    tensors: dict[str, str] = field(default_factory=dict)
    problem: Exception | None = None
    _source: Hash | None = None
    _output: Hash = field(default_factory=digests.new)

    def in_background(self, stack: ExitStack) -> tuple[Taker, Taker]:
        """Takers of what is read and of what is written, until the end of the stack, that return at once.

        Two hashes by sha256 need two cores to be as fast as a disk. Those by BLAKE3 do not (2.4 GB/s, measured), and in
        one thread the second finds the bytes in the processor's cache.
        """
        if self.file.algorithm != BLAKE3:
            takers = [
                stack.enter_context(consumer(take, CHUNKS_AHEAD)) for take in (self.take_source, self.take_output)
            ]
            return takers[0], takers[1]
        later: Taker = stack.enter_context(consumer(_call, CHUNKS_AHEAD))
        return lambda item: later(partial(self.take_source, item)), lambda item: later(partial(self.take_output, item))

    def take_source(self, item: tuple[Piece, Data]) -> None:
        """The next bytes of a source tensor."""
        piece, content = item
        self._source = self._source or digests.like(piece.tensor.span.digest)
        self._source.update(content)
        if piece.is_last:
            self._end_source(piece)

    def take_output(self, item: tuple[Piece | None, Content, bool]) -> None:
        """The next bytes of the file; those of a span of another one are read, and taken as its too."""
        piece, content, ends = item
        if isinstance(content, FileSpan):
            assert piece is not None
            self._take_copy(piece, content)
            return
        self.file.update(content)
        if piece is None or self._keeps_digest(piece.tensor):
            return
        self._output.update(content)
        if ends:
            self._end_output(piece)

    def _take_copy(self, piece: Piece, span: FileSpan) -> None:
        source = self._source or digests.like(piece.tensor.span.digest)
        taking = [source, self.file, *([] if self._keeps_digest(piece.tensor) else [self._output])]
        for block in span.blocks():
            for one in taking:
                one.update(block)
        self._source = source
        if piece.is_last:
            self._end_source(piece)
            if not self._keeps_digest(piece.tensor):
                self._end_output(piece)

    def _end_source(self, piece: Piece) -> None:
        span = piece.tensor.span
        assert self._source is not None
        found, self._source = self._source.text(), None
        if span.digest and found != span.digest:
            self.problem = self.problem or MismatchError(
                f"{piece.name} in {span.url} must have the hash that its manifest says, but differs: the file was "
                "changed or damaged after it was committed; delete that artifact and run its stage again"
            )
        if self._keeps_digest(piece.tensor):
            self.tensors[piece.name] = found

    def _end_output(self, piece: Piece) -> None:
        self.tensors[piece.name], self._output = self._output.text(), digests.new()

    def _keeps_digest(self, tensor: OutputTensor) -> bool:
        """Whether the digest on the way in is that on the way out: the same bytes, hashed as the file is."""
        digest = tensor.span.digest
        return tensor.is_copy and (not digest or digests.algorithm_of(digest) == self.file.algorithm)

    def raise_problem(self) -> None:
        """Raise what the threads found."""
        if self.problem:
            raise self.problem


def _call(function: Callable[[], object]) -> None:
    function()


class Sources:
    """Reads many files: local ones in this thread, but where others are among them, all a few requests ahead."""

    def __init__(self) -> None:
        self._open: dict[str, OpenFile] = {}
        self._free: deque[NDArray[np.uint8]] = deque()
        self._low_rank: tuple[LowRank, LowRankValues] | None = None

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, file: OutputFile, copies: bool = False) -> Iterator[tuple[Piece, Content]]:
        """The pieces of a file with their bytes, in order; raises DataError when a source ends too early.

        Where local files are copied (`copies`), bytes that do not change are not read here.
        """
        if all(paths.is_local(tensor.span.url) for _, tensor in file.tensors):
            for piece in _pieces(file, copies):
                (url, start), length = _place(piece), piece.end - piece.start
                if copies and piece.tensor.is_copy:
                    yield piece, FileSpan(self._file(url), start, length)
                else:
                    yield piece, self._file(url).read(start, length)
            return
        for request, content in in_order(self._fetched, requests(file, REQUEST_BYTES), REQUESTS_AHEAD):
            yield from _split(request, content)
            del content  # its buffer is free once nobody else has a view of it

    def bytes_of(self, span: TensorSpan, start: int, end: int) -> bytes:
        """Bytes [start, end) of a tensor."""
        first, length = span.start + start, end - start
        if paths.is_local(span.url):
            return self._file(span.url).read(first, length)
        content = paths.read_bytes(span.url, first, first + length) if length else b""
        _check_length(span.url, length, len(content))
        return content

    def low_rank(self, matrix: LowRank) -> LowRankValues:
        """A [R, I] and scale · B [O, R] in float32; those of the tensor that is being written are kept."""
        if self._low_rank is None or self._low_rank[0] is not matrix:
            a_RI, b_OR = (values_of(span).reshape(span.shape) for span in (matrix.a, matrix.b))
            self._low_rank = matrix, (a_RI, b_OR * np.float32(matrix.scale))
        return self._low_rank[1]

    def _fetched(self, request: Request) -> tuple[Request, memoryview]:
        view = self._buffer(request.length)
        if request.length:
            _check_length(
                request.url, request.length, paths.store_of(request.url).read_into(request.url, request.start, view)
            )
        return request, view.toreadonly()

    def _buffer(self, length: int) -> memoryview:
        """So many bytes of memory, used again when the last view of it is gone, whoever had it.

        Fresh memory for every request would cost a page fault for each 4 KiB. Nobody waits for a buffer that is free:
        who writes may keep any number of views, until they are a part of its own size.
        """
        try:
            memory = self._free.popleft()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < length:
            memory = np.empty(max(length, REQUEST_BYTES), np.uint8)
        lease: Any = memory[:length]
        weakref.finalize(lease, self._free.append, memory)
        return memoryview(lease)

    def _file(self, url: str) -> OpenFile:
        if url not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[url] = OpenFile(url)
        return self._open[url]


def _split(request: Request, content: memoryview) -> Iterator[tuple[Piece, Data]]:
    """The pieces of a request, each with its bytes of the content."""
    start = 0
    for piece in request.pieces:
        end = start + piece.end - piece.start
        yield piece, content[start:end]
        start = end


def _check_length(url: str, length: int, found: int) -> None:
    if found < length:
        raise DataError(f"{url} must be a whole weight file, but ends {length - found} bytes early; make it again")
