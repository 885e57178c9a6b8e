"""Which bytes of which file go where: the plan of a merge, made from safetensors headers alone.

A plan is plain data and touches no weights. Executing it (stream.py) is copying spans of bytes in order, so the output
is the same whatever the chunk size, and equals what a naive in-memory merge would save.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from checkpoints import Artifact, paths, safetensors
from checkpoints.parallel import in_order
from checkpoints.safetensors import FLOATS, ITEM_BYTES, TensorSpan, read_spans

HEADERS_AT_ONCE = 16
METADATA = {"format": "pt"}  # what transformers expects


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank, `scale` · B A: B is [rows, R] and A [R, columns]."""

    a: TensorSpan
    b: TensorSpan
    scale: float


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write: where its bytes come from, and what becomes of them on the way.

    The values of `span` are converted to `dtype`, after those of `added` were added to them in float32. A matrix may
    grow: `columns` more at the end of every row, those of `beside` or zeros, then `rows` more rows, those of `below` or
    zeros; both float32.
    """

    span: TensorSpan
    dtype: str
    columns: int = 0
    rows: int = 0
    beside: TensorSpan | None = None
    below: TensorSpan | None = None
    added: LowRank | None = None

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the source, so that its hash is known too."""
        return self.dtype == self.span.dtype and not self.columns and not self.rows and self.added is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after growing."""
        if not self.columns and not self.rows:
            return self.span.shape
        rows, columns = self.span.shape
        return (rows + self.rows, columns + self.columns)

    @property
    def length(self) -> int:
        """Bytes in the output."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class OutputFile:
    """One weight file to write: its header and the tensors that follow it, in order, without gaps."""

    name: str
    tensors: tuple[tuple[str, OutputTensor], ...]

    @cached_property
    def header(self) -> bytes:
        """Length prefix and header, as safetensors writes them."""
        return header_bytes(self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return len(self.header) + sum(tensor.length for _, tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """All weight files of a model; with more than one, `index` is the content of their index file."""

    files: tuple[OutputFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def index(self) -> dict[str, Any] | None:
        """Hugging Face's index of a sharded model, or None for a single file."""
        if len(self.files) == 1:
            return None
        weight_map = {name: file.name for file in self.files for name, _ in file.tensors}
        total = sum(tensor.length for file in self.files for _, tensor in file.tensors)
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def spans_of(artifact: Artifact, name: str) -> dict[str, TensorSpan]:
    """Spans of all tensors of a committed weight file, with their hashes."""
    return read_spans(artifact.file_url(name), artifact.entry(name).tensors)


def spans_of_each(artifacts: Sequence[Artifact], name: str) -> list[dict[str, TensorSpan]]:
    """The spans of the same file in many artifacts, whose sizes are checked; those of an object store side by side."""
    if not artifacts or paths.is_local(artifacts[0].url):
        return [spans_of(artifact, name) for artifact in artifacts]

    def read(artifact: Artifact) -> dict[str, TensorSpan]:
        entry = artifact.entry(name)
        return read_spans(artifact.file_url(name), entry.tensors, entry.size)

    return [*in_order(read, artifacts, HEADERS_AT_ONCE)]


def output_tensors(spans: Mapping[str, TensorSpan], dtype: str | None = None) -> dict[str, OutputTensor]:
    """The tensors as they are, or converted to `dtype` (safetensors' name of a float type) where they are floats."""
    floats = FLOATS if dtype else ()
    return {
        name: OutputTensor(span, dtype if dtype and span.dtype in floats else span.dtype)
        for name, span in spans.items()
    }


def plan_merge(tensors: Mapping[str, OutputTensor], max_shard_bytes: int) -> MergePlan:
    """Distribute tensors over weight files of at most `max_shard_bytes` (a larger tensor gets a file of its own)."""
    whole = OutputFile("model.safetensors", tuple(in_file_order(tensors.items())))
    return MergePlan(tuple(split(whole, max_shard_bytes)))


def split(file: OutputFile, max_shard_bytes: int) -> list[OutputFile]:
    """The file as it is, or in shards of at most `max_shard_bytes` of tensors, named as Hugging Face names them."""
    shards: list[list[tuple[str, OutputTensor]]] = [[]]
    size = 0
    for name, tensor in file.tensors:
        if shards[-1] and size + tensor.length > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.length
    if len(shards) == 1:
        return [file]
    stem, count = file.name.removesuffix(".safetensors"), len(shards)
    return [
        OutputFile(f"{stem}-{number:05d}-of-{count:05d}.safetensors", tuple(shard))
        for number, shard in enumerate(shards, start=1)
    ]


def plan_parts(parts: Mapping[str, Mapping[str, OutputTensor]]) -> MergePlan:
    """A weight file for each part of the model, by file name, so that parts can be linked and exchanged."""
    return MergePlan(tuple(OutputFile(name, tuple(in_file_order(part.items()))) for name, part in parts.items()))


def in_file_order(tensors: Iterable[tuple[str, OutputTensor]]) -> list[tuple[str, OutputTensor]]:
    """safetensors' own order: wide types first (so that every tensor is aligned), then by name."""
    return sorted(tensors, key=lambda item: (-ITEM_BYTES[item[1].dtype], item[1].dtype, item[0]))


def header_bytes(tensors: Iterable[tuple[str, OutputTensor]]) -> bytes:
    """Length prefix and header of a weight file holding these tensors without gaps, as safetensors writes them."""
    entries = ((name, tensor.dtype, tensor.shape, tensor.length) for name, tensor in tensors)
    return safetensors.header_bytes(entries, METADATA)
